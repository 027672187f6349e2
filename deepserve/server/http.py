"""uvicorn's fast HTTP parser, bounded: a request line and headers without end would otherwise fill the memory."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deepserve.errors import AskError
from deepserve.server import limits
from deepserve.server.errors import error_response

_REFUSAL = b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection whose headers pass the limit before they are complete."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._num_header_bytes = 0
        self._num_events = 0  # headers and messages completed
        self._in_headers = True

    def data_received(self, data: bytes) -> None:
        """What the client sent next."""
        known = self._num_events
        super().data_received(data)
        if self._in_headers and known == self._num_events:  # all of it belongs to headers
            self._num_header_bytes += len(data)
            if self._num_header_bytes > limits.MAX_HEADER_BYTES and not self.transport.is_closing():
                self._refuse(431, f"the request line and headers take more than {limits.MAX_HEADER_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is not HTTP, in our shape."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = error_response(AskError(message, status=status)).body
        self.transport.write(_REFUSAL % (status, HTTPStatus(status).phrase.encode(), len(body), body))
        self.transport.close()

    def on_headers_complete(self) -> None:
        """The parser has seen all headers of a request."""
        self._in_headers, self._num_events = False, self._num_events + 1
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """And all of its body: the next request may begin."""
        super().on_message_complete()
        self._in_headers, self._num_events, self._num_header_bytes = True, self._num_events + 1, 0
