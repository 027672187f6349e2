"""The README's commands run. A `bash` or `python` block is run as it stands, but for three things:

- lines that start with `make` are only checked to be targets (tests/house/test_docs.py),
- a line that starts with `deepserve serve` starts a server that stays until the end of its block, on a free port
  (which is also put in place of 8000 in the rest of the block),
- a block that comes after `<!-- not run: reason -->` is left out.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- not run: [^>]+-->\n+)?```(bash|python)\n(.*?)```", re.S)


def _blocks() -> list:
    text = (ROOT / "README.md").read_text()
    found = []
    for skipped, language, code in BLOCK.findall(text):
        lines = [line.removeprefix("$ ") for line in code.splitlines()]
        kept = [line for line in lines if language == "python" or not line.startswith(("make ", "git clone ", "cd "))]
        if not skipped and "".join(kept).strip():
            title = next((line for line in kept if line.strip() and not line.startswith("#")), language)
            found.append(pytest.param(language, kept, id=title[:40].strip()))
    return found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with this interpreter and a `deepserve` that runs this tree."""
    command = tmp_path / "deepserve"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deepserve.cli.main "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(("language", "lines"), _blocks())
def test_readme_block(language: str, lines: list[str], environment: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = None
    if language == "bash":
        serve = next((line for line in lines if line.startswith("deepserve serve")), None)
        lines = [line.replace("8000", port) for line in lines if line != serve]
        if serve:
            command = serve.split("#")[0].rstrip(" &")
            if port not in command:
                command = command.replace("8000", port) if "8000" in command else f"{command} --port {port}"
            server = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=ROOT, env=environment)
    try:
        if server:
            _wait_until_ready(server, port)
        runner = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*runner, "\n".join(lines)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        if server:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0


def _wait_until_ready(server: subprocess.Popen, port: str) -> None:
    for _ in range(1200):
        assert server.poll() is None, "the server ended before it was ready"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server was not ready within 120 s")
