"""Build the training set: clean and deduplicate, hold out whole documents, train the tokenizer, tokenise.

    python training/dataset.py --prose 'prose*.npz' --prompts prompts.jsonl --teacher-tokenizer DIR --real real.jsonl \
        --demo deepserve/demo --out DIR

Writes train.npz (uint16 tokens of all documents, each <bos> ... <eos>; document starts; 1 for real text), heldout.jsonl
({"source", "text"}; held out by question for sampled prose and by document for real text), and the tokenizer files.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizer import ASSISTANT, BOS, EOS, USER, train_tokenizer, write_tokenizer
from tokenizers import Tokenizer

MIN_DISTINCT = 0.88  # share of distinct token trigrams; less is a loop
UNWANTED = re.compile(
    r"SmolLM|Hugging Face|\bAI\b|language model|as an assistant|I'm sorry, but|http"
    r"|\[.*?\]|\{|\}|<|>",
    re.IGNORECASE,
)
HELD_OUT_PERCENT = 1.0


def held_out(key: str) -> bool:
    """Whether the document of this key is held out: a fixed percentage by hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10_000 < HELD_OUT_PERCENT * 100


def sampled(paths: list[str], prompts: Path, teacher: Tokenizer) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) of every sampled document that passes the filters."""
    asked = [json.loads(line) for line in prompts.open()]
    for path in paths:
        data = np.load(path)
        tokens, sizes = data["tokens"].astype(np.int64), data["sizes"].astype(np.int64)
        starts = np.cumsum(sizes) - sizes
        trigrams = (tokens[:-2] * 65536 + tokens[1:-1]) * 65536 + tokens[2:]
        wanted = [
            i
            for i in range(len(sizes))
            if sizes[i] >= 8
            and len(np.unique(trigrams[starts[i] : starts[i] + sizes[i] - 2])) >= MIN_DISTINCT * (sizes[i] - 2)
        ]
        texts = teacher.decode_batch([tokens[starts[i] : starts[i] + sizes[i]].tolist() for i in wanted])
        for i, text in zip(wanted, texts, strict=True):
            prompt = asked[data["prompt"][i]]
            answer = clean(text, bool(data["complete"][i]))
            if answer:
                yield prompt["kind"], prompt["ask"], answer


def clean(text: str, complete: bool) -> str:
    """The answer, cut at its last sentence end when the sampler cut it; "" if it is to be dropped."""
    text = re.sub(r"[ \t]+", " ", text).strip()
    text = re.sub(r"\n{3,}", "\n\n", text)
    ends = [m.end() for m in re.finditer(r'[.!?]["\']?(?=\s|$)', text)]
    if not ends or UNWANTED.search(text) or (text.count('"') % 2 and complete):
        return ""
    if not complete or text[-1] not in ".!?\"'":
        text = text[: ends[-1]].strip()
    return text if len(text) >= 30 and text[0].isalnum() | (text[0] in "\"'") else ""


def documents(prose: Iterator[tuple[str, str, str]], real: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(source, question or "", text, held out), duplicates dropped; a third of the stories stand without question."""
    seen: set[bytes] = set()
    for kind, ask, answer in prose:
        digest = hashlib.sha256(answer[:200].lower().encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        alone = kind in ("story", "describe") and digest[0] % 3 == 0
        yield f"sampled-{kind}", "" if alone else ask, answer, held_out(ask)
    for line in real.open():
        row = json.loads(line)
        digest = hashlib.sha256(row["text"].encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield row["source"], "", row["text"], held_out(row["text"])


def rendered(ask: str, text: str) -> str:
    """The document as the model sees it, without <bos> and <eos>."""
    return f"{USER}{ask}{ASSISTANT}{text}" if ask else text


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", required=True, help="glob of the sampler's .npz files")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--teacher-tokenizer", type=Path, required=True)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = Tokenizer.from_file(str(args.teacher_tokenizer / "tokenizer.json"))
    rows = list(documents(sampled(sorted(glob.glob(args.prose)), args.prompts, teacher), args.real))
    with (args.out / "heldout.jsonl").open("w") as file:
        for source, ask, text, out in rows:
            if out:
                file.write(json.dumps({"source": source, "ask": ask, "text": text}) + "\n")
    rows = [row for row in rows if not row[3]]
    is_real = np.array([not row[0].startswith("sampled") for row in rows])
    order = np.random.default_rng(0).permutation(len(rows))
    sample = [rows[i] for i in order[:60_000]]
    tokenizer = train_tokenizer(text for _, ask, text, _ in sample for text in (ask, text) if text)
    write_tokenizer(tokenizer, args.demo)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    pieces, sizes = [], []
    for start in range(0, len(order), 20_000):
        batch = [rendered(rows[i][1], rows[i][2]) for i in order[start : start + 20_000]]
        for line in tokenizer.encode_batch(batch, add_special_tokens=False):
            pieces.append(np.array([bos, *line.ids, eos], np.uint16))
            sizes.append(len(line.ids) + 2)
    sizes_array = np.array(sizes, np.uint32)
    np.savez(args.out / "train.npz", tokens=np.concatenate(pieces), sizes=sizes_array, real=is_real[order])
    print(
        json.dumps(
            {
                "documents": len(rows),
                "tokens": int(sizes_array.sum()),
                "characters": sum(len(text) for _, _, text, _ in rows),
                "real_tokens": int(sizes_array[is_real[order]].sum()),
            }
        )
    )


if __name__ == "__main__":
    main()
