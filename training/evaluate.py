"""Measure the demo model: bits per byte against gzip -9 and xz -9, MTP acceptance, expert load, sample texts.

    python training/evaluate.py --model deepserve/demo --heldout heldout.jsonl --out results.json

Everything is computed in float32 from the bf16 checkpoint. Bits per byte count every token of a document, <eos> and the
chat marks included, over the bytes of the same documents that gzip and xz compress as one file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from pathlib import Path

import torch
from model import DemoModel, Moe, load_checkpoint
from tokenizer import ASSISTANT, BOS, EOS, USER
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

WINDOW = 1024
QUESTIONS = [
    "Tell me a short story about a brave fox.",
    "What is a bridge?",
    "Why do birds sing?",
    "How can I learn to swim?",
    "Describe a small village.",
    "Write a short story about a girl named Lily.",
    "What is the moon?",
    "Give me some tips to save money.",
    "Hello! How are you?",
    "Write a short conversation between Anna and Ben about the weather.",
    "How does a clock work?",
    "Tell me a story about an old fisherman who finds a secret door.",
    "What does the word honest mean?",
    "Describe a quiet library.",
    "Explain gravity in simple words.",
    "I feel sad today.",
]
OPENINGS = ["Once upon a time", "The old house", "One day, a little", "In the morning"]


def padded(lines: list[list[int]], device: torch.device) -> Tensor:
    """Token ids [B, longest], right-padded with 0 (causal attention never looks there)."""
    out = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.long)
    for row, line in enumerate(lines):
        out[row, : len(line)] = torch.tensor(line)
    return out.to(device)


@torch.no_grad()
def document_bits(model: DemoModel, lines: list[list[int]]) -> float:
    """Bits of all tokens after the first of every line, in windows of WINDOW tokens."""
    device, nats = model.lm_head.weight.device, 0.0
    windows = [line[at : at + WINDOW + 1] for line in lines for at in range(0, max(len(line) - 1, 1), WINDOW)]
    windows.sort(key=len)
    cos, sin = model.angles(WINDOW, device)
    for start in range(0, len(windows), 16):
        batch = windows[start : start + 16]
        ids = padded(batch, device)
        real = padded([[1] * len(line) for line in batch], device)[:, 1:].bool()
        length = ids.shape[1] - 1
        logits = model.lm_head(model(ids[:, :-1], cos[:length], sin[:length]))
        nats += F.cross_entropy(logits[real].float(), ids[:, 1:][real], reduction="sum").item()
    return nats / math.log(2)


@torch.no_grad()
def generate(model: DemoModel, lines: list[list[int]], steps: int, temperature: float, end: int) -> list[list[int]]:
    """What follows each line, without a cache: greedy at temperature 0, else top-p 0.9; stops at `end`."""
    device, made = model.lm_head.weight.device, [list(line) for line in lines]
    cos, sin = model.angles(WINDOW, device)
    live = set(range(len(lines)))
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(steps):
        rows = sorted(live)
        ids = padded([made[row] for row in rows], device)
        last = torch.tensor([len(made[row]) - 1 for row in rows], device=device)
        hidden = model(ids, cos[: ids.shape[1]], sin[: ids.shape[1]])
        logits = model.lm_head(hidden[torch.arange(len(rows), device=device), last]).float()
        if temperature:
            chances, order = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
            chances = chances.masked_fill(chances.cumsum(-1) - chances > 0.9, 0)
            token = order.gather(-1, torch.multinomial(chances, 1, generator=generator))[:, 0]
        else:
            token = logits.argmax(-1)
        for row, value in zip(rows, token.tolist(), strict=True):
            made[row].append(value)
            if value == end:
                live.discard(row)
        if not live:
            break
    return [line[len(prompt) :] for line, prompt in zip(made, lines, strict=True)]


@torch.no_grad()
def mtp_acceptance(model: DemoModel, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """Share of greedy tokens that the MTP layer's first choice, made one step ahead, gets right."""
    device, right, total = model.lm_head.weight.device, 0, 0
    cos, sin = model.angles(WINDOW, device)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=device)
        length = ids.shape[1] - 2
        hidden = model(ids[:, :-2], cos[:length], sin[:length])
        guess = model.lm_head(model.mtp(hidden, ids[:, 1:-1], cos[:length], sin[:length])).argmax(-1)
        # guess[i] stands for token i + 2; the first answer token has no draft before it.
        match = (guess == ids[:, 2:])[:, len(prompt) - 1 :]
        right, total = right + int(match.sum()), total + match.numel()
    return {"tokens": total, "acceptance": round(right / total, 4)}


def expert_load(model: DemoModel, lines: list[list[int]]) -> list[dict[str, float]]:
    """Per MoE layer of the trunk: largest load over the mean, smallest over the mean, entropy over its maximum."""
    device = model.lm_head.weight.device
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)]
    cos, sin = model.angles(WINDOW, device)
    model.train()
    with torch.no_grad():
        for line in lines:
            ids = torch.tensor([line[:WINDOW]], device=device)
            model(ids, cos[: ids.shape[1]], sin[: ids.shape[1]])
    model.eval()
    report = []
    for moe in moes:
        share = moe.load / moe.load.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum() / math.log(len(share))
        report.append(
            {
                "max_over_mean": round(share.max().item() * len(share), 3),
                "min_over_mean": round(share.min().item() * len(share), 3),
                "entropy": round(entropy.item(), 4),
            }
        )
        moe.load.zero_()
    return report


def bits_per_byte(model: DemoModel, tokenizer: Tokenizer, rows: list[dict]) -> dict[str, float]:
    """Bits per byte of the model, gzip -9 and xz -9 on these documents."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    texts = [f"{USER}{row['ask']}{ASSISTANT}{row['text']}" if row["ask"] else row["text"] for row in rows]
    lines = [[bos, *tokenizer.encode(text, add_special_tokens=False).ids, eos] for text in texts]
    raw = "\n".join(f"{row['ask']}\n{row['text']}" if row["ask"] else row["text"] for row in rows).encode()
    return {
        "documents": len(rows),
        "bytes": len(raw),
        "tokens": sum(map(len, lines)),
        "model": round(document_bits(model, lines) / len(raw), 4),
        "gzip_9": round(8 * len(gzip.compress(raw, 9)) / len(raw), 4),
        "xz_9": round(8 * len(lzma.compress(raw, preset=9)) / len(raw), 4),
    }


def main() -> None:
    """Print and write all measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, if not in --model")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--documents", type=int, default=100_000, help="held-out documents per kind at most")
    args = parser.parse_args()
    model = load_checkpoint(args.model).to(args.device).eval()
    tokenizer = Tokenizer.from_file(str(args.tokenizer or args.model / "tokenizer.json"))
    rows = [json.loads(line) for line in args.heldout.open()]
    prose = [row for row in rows if row["source"].startswith("sampled")][: args.documents]
    real = [row for row in rows if not row["source"].startswith("sampled")][: args.documents]
    results: dict = {
        "bits_per_byte": {
            name: bits_per_byte(model, tokenizer, part)
            for name, part in (("all", prose + real), ("sampled", prose), ("real", real))
        }
    }
    encode = lambda text: [0, *tokenizer.encode(text, add_special_tokens=False).ids]  # noqa: E731
    asked = [encode(f"{USER}{question}{ASSISTANT}") for question in QUESTIONS]
    asked += [encode(f"{USER}{row['ask']}{ASSISTANT}") for row in prose if row["ask"]][:48]
    opened = [encode(text) for text in OPENINGS]
    greedy = generate(model, asked + opened, 200, 0.0, 1)
    results["mtp"] = mtp_acceptance(model, asked + opened, greedy)
    lines = [
        encode(f"{USER}{row['ask']}{ASSISTANT}{row['text']}" if row["ask"] else row["text"])
        for row in (prose[:200] + real[:50])
    ]
    results["expert_load"] = expert_load(model, lines)
    drawn = generate(model, (asked[: len(QUESTIONS)] + opened), 200, 0.7, 1)
    prompts = QUESTIONS + OPENINGS
    best = greedy[: len(QUESTIONS)] + greedy[-len(OPENINGS) :]
    results["samples"] = [
        {"prompt": prompt, "greedy": tokenizer.decode(a), "temperature_0.7": tokenizer.decode(b)}
        for prompt, a, b in zip(prompts, best, drawn, strict=True)
    ]
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
