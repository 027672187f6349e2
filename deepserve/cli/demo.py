"""`deepserve demo`: start the server on the model that ships with the package, ask it something, stop it.

It goes the whole way that a user goes: a server process, readiness over HTTP, a streamed chat completion, SIGTERM.
Standard library only, so that it shows what any client needs.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from deepserve.cli.remote import Remote, free_port
from deepserve.errors import AskError

MODEL = Path(__file__).resolve().parent.parent / "demo"
QUESTION = "Write a short story about a lighthouse."
QUIET = ["--disable-log-stats", "--disable-uvicorn-access-log"]  # lines that would break into the answer


def run(argv: list[str]) -> int:
    """Run the demo and return the exit status: 0 only if an answer was streamed and the server stopped cleanly."""
    args = _parser().parse_args(argv)
    port = args.port or free_port()
    command = [sys.executable, "-m", "deepserve.cli.main", "serve", str(args.model), "--port", str(port), *QUIET]
    print("$", " ".join(["deepserve", *command[3:]]), flush=True)
    server = subprocess.Popen(command)
    try:
        remote = Remote(f"http://127.0.0.1:{port}")
        seconds = _wait_until_ready(server, remote, args.timeout)
        print(f"\nready after {seconds:.1f} s at http://127.0.0.1:{port}/v1\n\n> {args.question}\n", flush=True)
        _ask(remote, args.question, args.max_tokens)
    except AskError as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        status = _stop(server)
    if status:
        print(f"the server exited with status {status} after SIGTERM, expected 0", file=sys.stderr)
        return 1
    print("the server has stopped")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepserve demo", description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--model", type=Path, default=MODEL, help="a checkpoint directory (default: the one shipped)")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for readiness")
    return parser


def _wait_until_ready(server: subprocess.Popen, remote: Remote, timeout: float) -> float:
    """Poll GET /ready until it answers 200; the seconds that took. Gives up as soon as the server is gone."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < timeout:
        if server.poll() is not None:
            raise AskError(f"the server exited with status {server.returncode} before it was ready")
        if remote.ready():
            return waited
        time.sleep(0.05)
    raise AskError(f"the server was not ready within {timeout:.0f} s", hint="--timeout")


def _ask(remote: Remote, question: str, max_tokens: int) -> None:
    """Stream one chat completion, print it as it arrives, then its speed by the server's own token count."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
    start = time.perf_counter()
    first = last = 0.0
    usage = None
    text = ""
    for event in remote.stream("/v1/chat/completions", body):
        usage = event.get("usage") or usage
        piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if piece:
            last = time.perf_counter()
            first = first or last
            text += piece
            print(piece, end="", flush=True)
    if not text.strip() or usage is None:
        raise AskError("the stream ended without a text" if not text.strip() else "the stream reported no usage")
    print("\n\n" + _speed(usage["completion_tokens"], first - start, last - first), flush=True)


def _speed(tokens: int, ttft: float, decoding: float) -> str:
    rate = f", then {(tokens - 1) / decoding:.0f} tokens/s" if tokens > 1 and decoding > 0 else ""
    return f"{tokens} tokens; the first after {ttft * 1e3:.0f} ms{rate}"


def _stop(server: subprocess.Popen) -> int:
    """SIGTERM, and SIGKILL 15 s later; the exit status, -9 for a server that had to be killed."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        return server.wait(timeout=15)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()
