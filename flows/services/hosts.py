"""By which names the servers may be called; whoever calls them by another one is refused."""

import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import psutil

from plumbline.errors import MachineError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
"""Listening there is listening at every address of the machine."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

AT_HOME = (b"content-security-policy", b"connect-src 'self'; img-src 'self' data: blob:")
"""Lets a page call nobody but its own server: Prefect's asks Amplitude how to watch its users, and
a picture in a text from elsewhere would tell who reads it."""

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f:.]+")
"""A host as it may be given: a name or an address, no port and no pattern."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str, more: Iterable[str] = ()) -> tuple[str, ...]:
    """The names and addresses by which a server that listens at `host` may be called.

    Args:
        host: where it listens.
        more: names that were given to it, of a proxy for example.
    """
    names = [*LOOPBACK, *more]
    if host in EVERYWHERE:
        names += [socket.gethostname(), socket.getfqdn(), *_addresses()]
    else:
        names.append(host)
    return tuple(dict.fromkeys(name.lower() for name in names))


def check_names(names: Iterable[str]) -> None:
    """Check that names are names of hosts.

    Raises:
        MachineError: one is not.
    """
    for name in names:
        if not NAME.fullmatch(name.lower()):
            raise MachineError(
                f"--name {name}: expected the name or address of a host, without http:// and "
                "without a port, for example plumbline.example.org"
            )


def in_url(host: str) -> str:
    """A host as it stands in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def _addresses() -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        # Less the zone, which no URL has: fe80::1%eth0.
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in families
    ]


class Gate:
    """An ASGI application that lets through what calls it by its own names.

    A foreign Host header comes from a foreign name that was made to point here (DNS rebinding), a
    foreign Origin from a page of another site, which a browser would let send requests here.
    """

    def __init__(self, app: App, names: Iterable[str]) -> None:
        self.app = app
        self.names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, a websocket, or the lifespan."""
        if scope["type"] == "lifespan" or self._admits(scope["headers"]):
            await self.app(scope, receive, _at_home(send))
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": self._refusal()})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self) -> bytes:
        return (
            "Refused: this server is not called by that name, or not from that page.\n"
            f"Expected one of {', '.join(sorted(self.names))}, in the address and for the page.\n"
            "Call it by one of these; of Prefect and MLflow, `plumbline up --name HOST` adds one.\n"
        ).encode()

    def _admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = [*headers]
        hosts = [_name(b"//" + value) for name, value in given if name == b"host"]
        origins = [_name(value) for name, value in given if name == b"origin"]
        return bool(hosts) and self.names.issuperset([*hosts, *origins])


def _at_home(send: Send) -> Send:
    async def sent(message: Scope) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), AT_HOME]
        await send(message)

    return sent


def _name(url: bytes) -> str:
    """The host of a URL; empty where it has none that can be read."""
    try:
        return urlsplit(url.decode("latin-1")).hostname or ""
    except ValueError:
        return ""
