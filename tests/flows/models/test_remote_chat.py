"""Tests of flows.models.remote_chat: a server that is not there yet, or says something else."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.models import remote_chat
from flows.models.remote_chat import open_remote_chat
from plumbline.errors import MachineError

Serve = Callable[..., AbstractContextManager[str]]


class Handler(BaseHTTPRequestHandler):
    """Answers as a model, or as its server was told to."""

    server: Server

    def do_GET(self) -> None:
        time.sleep(self.server.loading)
        self.say(self.server.ping, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say(*self.server.answer)

    def say(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """What listens in place of `plumbline serve`."""

    loading = 0.0
    ping = 200
    answer: tuple[int, object] = (200, {"choices": [{"message": {"content": "Fold it."}}]})

    def handle_error(self, *args: object) -> None:
        """Who has hung up gets no answer."""


@pytest.fixture
def serve() -> Serve:
    """Serves at a port from a moment on."""

    @contextmanager
    def serve(after: float = 0.0, **how: object) -> Iterator[str]:
        server = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
        server.__dict__.update(how)
        with socket.create_server(("127.0.0.1", 0)) as free:
            server.server_address = free.getsockname()

        def run() -> None:
            time.sleep(after)
            server.server_bind()
            server.server_activate()
            server.serve_forever(0.05)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    return serve


def talk(url: str, said: list[str]) -> str:
    chat = open_remote_chat(url, said.append, temperature=1.0, max_tokens=8, seed=0)
    return chat("How do I fold a napkin?")


def test_a_server_that_does_not_listen_yet_is_waited_for(serve, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(remote_chat, "PATIENCE", 0.1)
    with serve(after=0.6) as url:
        assert talk(url, said) == "Fold it."
    assert said == [f"nobody listens at {url} yet …"]


def test_a_model_that_loads_is_waited_for(serve, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(remote_chat, "PATIENCE", 0.2)
    with serve(loading=0.6) as url:
        assert talk(url, said) == "Fold it."
    assert said == [f"the server at {url} listens; its model is still loading …"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"after": 1.0}, "nobody listens"),
        ({"loading": 1.0}, "timed out after"),
        ({"ping": 404}, "HTTP Error 404"),
    ],
)
def test_waiting_has_an_end(serve, monkeypatch, how, words):
    for name, seconds in (("LISTEN", 0.3), ("LOAD", 0.3)):
        monkeypatch.setattr(remote_chat, f"SECONDS_TO_{name}", seconds)
    monkeypatch.setattr(remote_chat, "PATIENCE", 0.1)
    with serve(**how) as url, pytest.raises(MachineError, match=rf"{words}.*`plumbline serve`"):
        talk(url, [])


def test_a_request_that_is_refused_does_not_end_the_chat(serve):
    refusal = {"error_code": "INVALID_PARAMETER_VALUE", "message": "The model's context is 160."}
    for status, body, said in ((400, refusal, refusal["message"]), (400, [1], "[1]")):
        with serve(answer=(status, body)) as url:
            assert talk(url, []) == f"({said})"
    with serve(answer=(500, {})) as url, pytest.raises(MachineError, match="got status 500"):
        talk(url, [])
