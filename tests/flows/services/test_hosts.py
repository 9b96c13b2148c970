"""Tests of flows.services.hosts: who may call a server, and by which name."""

import asyncio
from typing import Any

import pytest

from flows.services.hosts import Gate, check_names, is_loopback, names_of
from plumbline.errors import MachineError

NAMES = names_of("127.0.0.1")


def answer(headers: dict[str, str], kind: str = "http") -> list[dict[str, Any]]:
    """What comes back for a request; the application behind the gate says "inside"."""
    sent: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "inside"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Gate(inside, NAMES)({"type": kind, "headers": raw}, receive, send))
    return sent


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "127.0.0.1:4200"},
        {"host": "localhost"},
        {"host": "LocalHost:80"},
        {"host": "[::1]:4200"},
        {"host": "127.0.0.1:4200", "origin": "http://localhost:4200"},
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_its_own_names_pass(headers, kind):
    assert answer(headers, kind) == [{"type": "inside"}]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "evil.example:4200"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.evil.example:4200"},
        {"host": "[::1"},
        {"host": "127.0.0.1:4200", "origin": "http://evil.example"},
        {"host": "127.0.0.1:4200", "origin": "null"},
    ],
)
def test_foreign_names_and_pages_are_refused(headers):
    start, body = answer(headers)
    assert start["status"] == 403
    assert body["body"].startswith(b"Refused")
    assert b"Expected one of 127.0.0.1, ::1, localhost" in body["body"]
    assert b"plumbline up --name HOST" in body["body"]
    assert answer(headers, "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_the_lifespan_passes_without_a_name():
    assert answer({}, "lifespan") == [{"type": "inside"}]


def test_pages_may_call_nobody_else():
    sent = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "headers": [(b"content-type", b"text/html")]})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", b"127.0.0.1:4200")]}
    asyncio.run(Gate(page, NAMES)(scope, None, send))
    (start,) = sent
    assert start["headers"] == [
        (b"content-type", b"text/html"),
        (b"content-security-policy", b"connect-src 'self'; img-src 'self' data: blob:"),
    ]


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.5.5.5", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("gpu.lan", False),
    ],
)
def test_what_only_this_machine_reaches(host, alone):
    assert is_loopback(host) is alone


def test_a_name_that_was_given_passes():
    assert "proxy.example" in names_of("127.0.0.1", ["Proxy.example"])
    check_names(["proxy.example", "10.0.0.7", "fe80::1"])
    for bad in ("https://proxy.example", "proxy.example:443", "*", "*.example", "a,b", ""):
        with pytest.raises(MachineError, match=r"--name .*without a port"):
            check_names([bad])


def test_a_server_is_called_by_where_it_listens():
    assert "gpu.lan" in names_of("GPU.lan")
    assert "evil.example" not in names_of("0.0.0.0")
    # Everywhere is at each address of the machine, of which one is the loopback's.
    assert {"127.0.0.1", "localhost"} < set(names_of("0.0.0.0"))
