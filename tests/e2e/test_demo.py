"""`make demo` is the first thing that a newcomer runs: it works from any directory, and says so when it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _demo(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deepserve.cli.main", "demo", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)


@pytest.mark.skipif(not (ROOT / "deepserve/demo/config.json").exists(), reason="no model ships yet")
def test_the_demo_streams_an_answer_and_stops_its_server(tmp_path: Path) -> None:
    done = _demo(tmp_path, "--max-tokens", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 tokens; the first after" in done.stdout
    assert "the server has stopped" in done.stdout


def test_the_demo_fails_where_the_server_does(tmp_path: Path) -> None:
    done = _demo(tmp_path, "--model", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "the demo failed: the server exited with status 2 before it was ready" in done.stderr
