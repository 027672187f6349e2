"""`deepserve demo`: start the server on the model that ships with the package, ask it something, stop it.

It goes the whole way that a user goes: a server process, readiness over HTTP, a streamed chat completion, SIGTERM.
Standard library only, so that it shows what any client needs.
"""

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "demo"
QUESTION = "Write a short story about a lighthouse."
QUIET = ["--disable-log-stats", "--disable-uvicorn-access-log"]  # lines that would break into the answer


class DemoFailed(Exception):
    """Something on the way did not work; the message says what."""


def run(argv: list[str]) -> int:
    """Run the demo and return the exit status: 0 only if an answer was streamed and the server stopped cleanly."""
    args = _parser().parse_args(argv)
    port = args.port or _free_port()
    command = [sys.executable, "-m", "deepserve.cli.main", "serve", str(args.model), "--port", str(port), *QUIET]
    print("$", " ".join(["deepserve", *command[3:]]), flush=True)
    server = subprocess.Popen(command)
    try:
        seconds = _wait_until_ready(server, port, args.timeout)
        print(f"\nready after {seconds:.1f} s at http://127.0.0.1:{port}/v1\n\n> {args.question}\n", flush=True)
        _ask(port, args.question, args.max_tokens, args.timeout)
    except (DemoFailed, OSError, http.client.HTTPException) as error:
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
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for readiness and for the answer")
    return parser


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(server: subprocess.Popen, port: int, timeout: float) -> float:
    """Poll GET /ready until it answers 200; the seconds that took. Gives up as soon as the server is gone."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < timeout:
        if server.poll() is not None:
            raise DemoFailed(f"the server exited with status {server.returncode} before it was ready")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return waited
        except (OSError, http.client.HTTPException):
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.05)
    raise DemoFailed(f"the server was not ready within {timeout:.0f} s. hint: --timeout")


def _ask(port: int, question: str, max_tokens: int, timeout: float) -> None:
    """Stream one chat completion, print it as it arrives, then its speed by the server's own token count."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise DemoFailed(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
    first = last = 0.0
    usage = None
    text = ""
    for event in _events(response):
        if "error" in event:
            raise DemoFailed(f"the stream ended in an error: {event['error']}")
        usage = event.get("usage") or usage
        piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if piece:
            last = time.perf_counter()
            first = first or last
            text += piece
            print(piece, end="", flush=True)
    connection.close()
    if not text.strip() or usage is None:
        raise DemoFailed("the stream ended without a text" if not text.strip() else "the stream reported no usage")
    print("\n\n" + _speed(usage["completion_tokens"], first - start, last - first), flush=True)


def _events(response: http.client.HTTPResponse) -> Iterator[dict]:
    """The JSON events of a server-sent stream, up to `data: [DONE]`, which must come."""
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
    raise DemoFailed("the stream broke off before [DONE]")


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
