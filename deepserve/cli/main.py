"""`deepserve VERB ...`: finds the verb's module and runs it. Errors of asking end with status 2 and a hint."""

from __future__ import annotations

import importlib
import sys

from deepserve import __version__
from deepserve.errors import AskError, did_you_mean

VERBS = {
    "serve": "serve a model over HTTP with OpenAI's API",
    "generate": "continue a text, offline",
    "chat": "talk to a model: a running server's, or one that is started for it",
    "bench": "measure: serve (a running server), throughput, latency (offline)",
    "ablate": "what each optimization is worth: added one at a time, and left out",
    "plan": "what would run, why, and what it costs; needs no GPU",
    "ops": "every op, its kernels, and what each needs",
    "tune": "the best tiles of kernels on this GPU, written as tuned tables",
    "doctor": "this machine, its versions, and what would be in the way",
    "demo": "the whole way once: start a server, ask it, stop it",
    "docs": "write the generated reference pages",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 good, 1 failed, 2 asked for what cannot be, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except AskError as error:
        print(f"deepserve {argv[0] if argv else ''}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 141


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"deepserve {__version__}")
        return 0
    if argv[0] not in VERBS:
        raise AskError(f"there is no such verb: {argv[0]}", hint=did_you_mean(argv[0], VERBS))
    return importlib.import_module(f"deepserve.cli.{argv[0]}").run(argv[1:])


def _help() -> str:
    verbs = "\n".join(f"  {name:10}{sentence}" for name, sentence in VERBS.items())
    return f"usage: deepserve VERB ...\n\n{verbs}\n\ndeepserve VERB --help says more; deepserve --version"


if __name__ == "__main__":
    sys.exit(main())
