"""The command line's own client of a server."""

import socket
import threading

import pytest

from deepserve.cli.remote import Remote
from deepserve.errors import AskError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"choices": []}\n\n'


@pytest.mark.parametrize("done", [True, False])
def test_an_answer_that_breaks_off_is_not_taken_for_a_complete_one(done: bool) -> None:
    def answer(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        with connection:
            connection.recv(65536)
            connection.sendall(HEAD + EVENT + (b"data: [DONE]\n\n" if done else b""))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,)).start()
        events = Remote(f"127.0.0.1:{listener.getsockname()[1]}").stream("/v1/completions", {})
        assert next(events) == {"choices": []}
        if done:
            assert list(events) == []
        else:
            with pytest.raises(AskError, match="broke off"):
                list(events)
