"""One engine in its own process and environment: `python worker.py PEER MODEL_DIRECTORY OPTIONS`, asked over stdin.

PEER names the module PEER_peer.py beside this file, whose `make(model, max_model_len, **options)` returns an engine
with `generate(prompts, max_tokens)`, `version` and `settings`. Each line on stdin is a JSON object
{"prompts": [[id, ...], ...], "max_tokens": n}, each line on stdout the answer {"seconds": ..., "tokens": [[id, ...]]};
the first line says that the engine is ready. What the engine itself prints goes to stderr.
"""

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Make the engine, say so, answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer, model, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = importlib.import_module(f"{peer}_peer").make(model, **options)
    ready = {"version": engine.version, "settings": engine.settings}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        ask = json.loads(line)
        if ask.get("probe"):
            answers.write(json.dumps({"probe": engine.probe(ask["prompts"], ask["max_tokens"])}) + "\n")
            continue
        start = time.perf_counter()
        tokens = engine.generate(ask["prompts"], ask["max_tokens"])
        seconds = time.perf_counter() - start
        if any(len(one) != ask["max_tokens"] for one in tokens):
            raise SystemExit(f"{peer} generated {[len(one) for one in tokens]} tokens, asked for {ask['max_tokens']}")
        answers.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")


if __name__ == "__main__":
    main()
