"""A real server process on a tiny checkpoint, for the tests of this folder and of tests/fuzz."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.tiny import CHECKPOINTS, write_tokenizer

READY_S = 90.0
WITNESS = {"prompt": [7, 8, 9, 10, 11], "max_tokens": 12, "temperature": 0, "return_token_ids": True}


def write_model(path: Path, **overrides: object) -> Path:
    """A checkpoint without weights, for `--load-format dummy`: what its tokens are does not matter to most tests."""
    kind, config = CHECKPOINTS["llama"]
    path.mkdir(parents=True)
    head = {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"], "dtype": "float32"}
    (path / "config.json").write_text(json.dumps({**head, **config, **overrides}))
    write_tokenizer(path)
    return path


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running `deepserve serve`. Its output is kept in `log`."""

    def __init__(self, model: Path, log: Path, *flags: str, api_key: str | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "deepserve.cli.main", "serve", str(model), "--port", str(self.port)]
        keys = ["--host", "127.0.0.1", "--api-key", api_key] if api_key else []
        with log.open("wb") as output:
            self.process = subprocess.Popen([*command, *keys, *flags], stdout=output, stderr=output)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def wait_until_ready(self) -> None:
        """Poll GET /ready; fails with the log as soon as the process is gone."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.http.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {READY_S} s:\n{self.log.read_text()}")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(r"([^{ ]+)(?:\{(.*)\})? (\S+)", line)
            if (
                found
                and found[1] == name
                and all(f'{key}="{value}"' in (found[2] or "") for key, value in labels.items())
            ):
                total += float(found[3])
        return total

    def witness(self) -> list[int]:
        """The greedy tokens of one fixed request; they must not depend on anything that came before."""
        reply = self.http.post("/v1/completions", json=WITNESS)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["token_ids"]

    def blocks_are_free(self) -> bool:
        """Whether no request runs, waits or holds blocks."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)

    def terminate(self, timeout: float = 20) -> int:
        """SIGTERM and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def eventually(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def serving(model: Path, folder: Path, *flags: str, api_key: str | None = None) -> Iterator[Server]:
    """A ready server, killed at the end if it is still there."""
    server = Server(model, folder / f"log-{time.monotonic_ns()}", *flags, api_key=api_key)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.http.close()
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(20)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()
                raise AssertionError(f"did not stop after SIGTERM:\n{server.log.read_text()}") from None
