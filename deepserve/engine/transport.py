"""Messages between the server and the engine process: closed types as msgpack over Unix sockets. Nothing is unpickled.

A message is two frames: the name of its type, from a closed table for each direction, and its fields. What is not in
the table, does not fit its type, or is too large, is logged and dropped. The sockets lie in a directory that only this
user may enter.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from deepserve.errors import AskError
from deepserve.log import get_logger
from deepserve.messages import AbortRequests, Control, ControlDone, EngineFailed, NewRequest, Phase, Ready, StepOutput

log = get_logger(__name__)

TO_ENGINE: tuple[type, ...] = (NewRequest, AbortRequests, Control)
TO_CLIENT: tuple[type, ...] = (Phase, Ready, StepOutput, ControlDone, EngineFailed)
MAX_MESSAGE_BYTES = 64 * 2**20  # a prompt of a million tokens takes 5 MB
MAX_QUEUED_MESSAGES = 100_000  # toward the engine, which is in a step
MAX_QUEUED_OUTPUTS = 1_000  # steps toward a client that does not read: then the engine waits
MAX_SOCKET_PATH = 100  # characters; the kernel's limit is 107
_FLUSH_MS = 1000  # how long the last words may take to leave a process that ends


class Rejected(ValueError):
    """A message that is not one of the agreed ones."""


class Codec:
    """Messages of the types `kinds` as frames, and back."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoders: dict[bytes, msgspec.msgpack.Decoder[Any]] = {}
        for kind in kinds:
            self._decoders[kind.__name__.encode()] = msgspec.msgpack.Decoder(kind)

    def encode(self, message: Any) -> list[bytes]:
        """[name of the type, msgpack of the fields]; AskError if that is more than MAX_MESSAGE_BYTES."""
        body = self._encoder.encode(message)
        if len(body) > MAX_MESSAGE_BYTES:
            raise AskError(f"takes {len(body):,} bytes, at most {MAX_MESSAGE_BYTES:,}", field="request", status=413)
        return [type(message).__name__.encode(), body]

    def decode(self, frames: list[bytes]) -> Any:
        """The message; Rejected says why there is none."""
        if len(frames) != 2:
            raise Rejected(f"{len(frames)} frames instead of 2")
        decoder = self._decoders.get(frames[0])
        if decoder is None:
            raise Rejected(f"unknown type {frames[0][:40]!r}")
        try:
            return decoder.decode(frames[1])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Rejected(f"{frames[0].decode()}: {error}") from None


def _decoded(codec: Codec, frames: list[bytes]) -> Any | None:
    try:
        return codec.decode(frames)
    except Rejected as error:
        log.error("dropped a message: %s", error)
        return None


def _socket(context: zmq.Context, kind: int, limit: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, limit)
    socket.setsockopt(zmq.RCVHWM, limit)
    socket.setsockopt(zmq.LINGER, _FLUSH_MS)
    return socket


def _addresses(directory: str) -> tuple[str, str]:
    return f"ipc://{directory}/to_engine", f"ipc://{directory}/to_client"


class ClientEnd:
    """The server's end, for asyncio. It makes the private directory and takes it away again."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="deepserve-")  # mode 0700
        if len(self.directory) > MAX_SOCKET_PATH - len("/to_engine"):
            shutil.rmtree(self.directory)
            raise AskError(
                f"{self.directory} is too long a path for a socket",
                field="TMPDIR",
                hint=f"a temporary directory of at most {MAX_SOCKET_PATH - 30} characters",
            )
        self._codec_out, self._codec_in = Codec(TO_ENGINE), Codec(TO_CLIENT)
        self._context = zmq.asyncio.Context()
        to_engine, to_client = _addresses(self.directory)
        self._out = _socket(zmq.Context(self._context), zmq.PUSH, MAX_QUEUED_MESSAGES)
        self._out.bind(to_engine)
        self._in = _socket(self._context, zmq.PULL, MAX_QUEUED_OUTPUTS)
        self._in.bind(to_client)

    def send(self, message: Any) -> None:
        """Queues a message for the engine. AskError 503 if the queue is full or nobody listens, 413 if too large."""
        try:
            self._out.send_multipart(self._codec_out.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise AskError("the engine takes no messages", status=503, code="engine_dead") from None

    async def receive(self) -> Any:
        """The next message from the engine."""
        while True:
            message = _decoded(self._codec_in, await self._in.recv_multipart())  # type: ignore[misc]
            if message is not None:
                return message

    def close(self) -> None:
        """Closes the sockets at once and removes their directory."""
        self._out.close(linger=0)
        self._in.close(linger=0)
        self._context.term()
        shutil.rmtree(self.directory, ignore_errors=True)


class EngineEnd:
    """The engine process's end: blocking, with a time-out."""

    def __init__(self, directory: str) -> None:
        if not Path(directory).is_dir():
            raise FileNotFoundError(directory)
        self._codec_out, self._codec_in = Codec(TO_CLIENT), Codec(TO_ENGINE)
        self._context = zmq.Context()
        to_engine, to_client = _addresses(directory)
        self._in = _socket(self._context, zmq.PULL, MAX_QUEUED_MESSAGES)
        self._in.connect(to_engine)
        self._out = _socket(self._context, zmq.PUSH, MAX_QUEUED_OUTPUTS)
        self._out.connect(to_client)

    def receive(self, timeout_s: float) -> list[Any]:
        """All messages that are there; waits up to `timeout_s` for the first."""
        messages: list[Any] = []
        if timeout_s > 0 and not self._in.poll(int(timeout_s * 1000)):
            return messages
        while True:
            try:
                frames = self._in.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = _decoded(self._codec_in, frames)
            if message is not None:
                messages.append(message)

    def send(self, message: Any) -> None:
        """Sends a message; waits while the client has MAX_QUEUED_OUTPUTS unread."""
        self._out.send_multipart(self._codec_out.encode(message))

    def close(self) -> None:
        """Closes the sockets once what was sent is out."""
        self._in.close(linger=0)
        self._out.close()
        self._context.term()
