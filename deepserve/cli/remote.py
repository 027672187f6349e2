"""A server as the command line sees it: one that runs, or one started for as long as it is needed. stdlib only."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deepserve.config import Config
from deepserve.errors import AskError


class Remote:
    """Talks to an OpenAI-compatible server at `url` (with or without its /v1)."""

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AskError(f"is {url!r}", field="url", hint="http://127.0.0.1:8000")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def ready(self) -> bool:
        """Whether GET /ready answers 200."""
        try:
            return self._open("GET", "/ready", None, 5).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def first_model(self) -> str:
        """The first name of /v1/models."""
        return json.loads(self._ask("GET", "/v1/models").read())["data"][0]["id"]

    def stream(self, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. AskError for an error before or in it."""
        response = self._ask("POST", route, {**body, "stream": True, "stream_options": {"include_usage": True}})
        with contextlib.suppress(OSError, http.client.HTTPException):
            for line in response:
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise AskError(event["error"].get("message", "the answer ended in an error"))
                    yield event
        raise AskError("the answer broke off: the connection has ended before [DONE]")

    def _ask(self, method: str, route: str, body: Any = None) -> http.client.HTTPResponse:
        try:
            response = self._open(method, route, body, 600)
        except (OSError, http.client.HTTPException) as error:
            raise AskError(f"no server answers at {self._host}:{self._port}: {error}", field="url") from None
        if response.status == 200:
            return response
        text = response.read().decode(errors="replace")
        try:
            told = json.loads(text)["error"]
            raise AskError(told["message"], hint=told.get("hint"))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, AskError):
                raise
            raise AskError(f"HTTP {response.status}: {text[:300]}") from None

    def _open(self, method: str, route: str, body: Any, timeout: float) -> http.client.HTTPResponse:
        connection = self._connect(self._host, self._port, timeout=timeout)
        connection.request(method, self._root + route, None if body is None else json.dumps(body), self._headers)
        return connection.getresponse()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def local_server(config: Config) -> Iterator[Remote]:
    """A server of this model on a free port of this machine, stopped at the end; its log is shown only if it fails."""
    port = free_port()
    asked = {**config.changed(), "host": "127.0.0.1", "port": port}
    asked.pop("api_key", None)
    with tempfile.TemporaryDirectory(prefix="deepserve-") as folder, Path(folder, "log").open("w+b") as output:
        file = Path(folder, "config.json")
        file.write_text(json.dumps({name.replace("_", "-"): value for name, value in asked.items()}))
        command = [sys.executable, "-m", "deepserve.cli.main", "serve", "--config", str(file)]
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            remote = Remote(f"http://127.0.0.1:{port}")
            while not remote.ready():
                if server.poll() is not None:
                    output.seek(0)
                    raise AskError("the server did not start:\n" + output.read().decode(errors="replace").strip())
                time.sleep(0.05)
            yield remote
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
