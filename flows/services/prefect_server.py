"""The Prefect server of runs that no other server was named for: one a project, while it is used.

The runs of a project share it. It ends by itself soon after the last of them, however that ended.
While `plumbline up` is on, its server takes the place of this one: it stays, and has pages.

    python -m flows.services.prefect_server HOME LISTENER ALIVE         as `join_server` starts it
    python -m flows.services.prefect_server HOME LISTENER ALIVE NAMES   as `plumbline up` does
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from flows.services.hosts import LOOPBACK, App, Gate
from flows.uncollected import uncollected
from plumbline.errors import MachineError
from tasks.templates import copy_template

T = TypeVar("T")

LINGER_SECONDS = 3.0
"""How long a server waits for the next run before it ends."""
START_SECONDS = 120.0
"""The first start in a new home makes the database, which takes longest."""

SHARED, LASTING = "server.alive", "server.up"
"""Files whose locks say that the server of the runs, or that of `plumbline up`, is alive."""
USERS = {SHARED: "server.users", LASTING: "server.up.users"}
"""Files whose locks say that a run uses the one or the other."""

WITHOUT_PAGES = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
}
"""Makes the server start sooner; the pages are for `plumbline up`, on the same database."""

WITH_PAGES = {
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    # The pages would call port 4200 otherwise, wherever they are.
    "PREFECT_UI_API_URL": "/api",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # In memory they would be lost with the server, and the slots that they hold never freed.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
}

_held: dict[str, int] = {}
"""Descriptors whose locks say that this process uses a server; they go with the process."""


def join_server(home: Path) -> None:
    """Point this process at the project's server, which is started where none runs.

    Returns before the server answers, so that the caller can import what it needs meanwhile. A
    server that PREFECT_API_URL names is used as it is. To be called before Prefect is imported.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    folder = _folder(home)
    users = _locked(folder / USERS[SHARED], fcntl.LOCK_SH)
    with _starting(folder):
        api = _running(folder, LASTING)
        if api is not None:
            _held[LASTING] = _locked(folder / USERS[LASTING], fcntl.LOCK_SH)
            os.close(users)
        else:
            _held[SHARED] = users
            api = _running(folder, SHARED) or _start(home, folder)
    os.environ["PREFECT_API_URL"] = api


def is_own() -> bool:
    """Whether this process uses the server of the runs, which ends with them and has no pages."""
    return SHARED in _held


def wait_for_server(home: Path) -> None:
    """Wait until the server answers.

    Raises:
        MachineError: it does not start, or a server that was named can't be reached.
    """
    api = os.environ["PREFECT_API_URL"]
    joined = next(iter(_held), None)
    deadline = time.monotonic() + (START_SECONDS if joined else 10.0)
    while time.monotonic() < deadline:
        try:
            # The port listens from the first moment, and a request waits in line.
            with urllib.request.urlopen(f"{api}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if joined and _running(home / "prefect", joined) is None:
                break
            time.sleep(0.1)
    log = home / "prefect" / "server.log"
    own = joined == SHARED
    said = log.read_text(errors="replace")[-2000:] if own and log.exists() else ""
    raise MachineError(
        f"Prefect's server at {api} does not answer. "
        + (f"Its log, {log}, ends:\n{said}" if own else "")
        + ("" if joined else "Start it, or unset PREFECT_API_URL.")
        + ("`plumbline up` mends it." if joined == LASTING else "")
    )


def start_lasting(
    home: Path,
    listener: socket.socket,
    api: str,
    names: Sequence[str],
    launch: Callable[[list[str], tuple[int, ...]], T],
) -> T:
    """Start the server of `plumbline up`, which the project's runs join from then on.

    Runs that use the server of the runs already stay with it: both work on the same database.

    Args:
        home: the project's folder for generated files.
        listener: a listening socket.
        api: URL at which this machine reaches the API.
        names: by which the server may be called.
        launch: starts a command that inherits these descriptors, and returns what it started.

    Raises:
        MachineError: one is alive.
    """
    folder = _folder(home)
    with _starting(folder):
        copy_template("prefect", folder / "prefect.db")
        if _running(folder, LASTING) is not None:
            raise MachineError(
                f"A Prefect server of `plumbline up` is alive that {home} has no record of. End it "
                "with `plumbline down`, then try again."
            )
        alive = _locked(folder / LASTING, fcntl.LOCK_EX)
        try:
            _note(alive, api)
            command = _command(home, listener.fileno(), alive)
            return launch([*command, ",".join(names)], (listener.fileno(), alive))
        finally:
            os.close(alive)


@contextmanager
def closing_lasting(home: Path) -> Iterator[bool]:
    """Let no run join a server inside the context; yields whether one uses that of `up` now."""
    folder = _folder(home)
    with _starting(folder):
        users = os.open(folder / USERS[LASTING], os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            used = False
        except BlockingIOError:
            used = True
        finally:
            os.close(users)
        yield used


def _folder(home: Path) -> Path:
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _locked(path: Path, operation: int) -> int:
    """A descriptor of the file, locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """Let one process at a time start, join or end a server."""
    descriptor = _locked(folder / "server.starting", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _running(folder: Path, kind: str) -> str | None:
    """The API of a server, or None where its process is gone."""
    try:
        with (folder / kind).open() as alive:
            try:
                fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return str(json.load(alive)["api"])
    except (OSError, ValueError, KeyError):
        pass
    return None


def _note(alive: int, api: str) -> None:
    os.ftruncate(alive, 0)
    os.pwrite(alive, json.dumps({"api": api}).encode(), 0)


def _command(home: Path, listener: int, alive: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "flows.services.prefect_server",
        str(home),
        str(listener),
        str(alive),
    ]


def _start(home: Path, folder: Path) -> str:
    """Start the server of the runs; returns its API, whose port listens already."""
    copy_template("prefect", folder / "prefect.db")
    with socket.socket() as listener, (folder / "server.log").open("ab") as log:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        api = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        # The lock is the server's, too, since it has the same open file.
        alive = _locked(folder / SHARED, fcntl.LOCK_EX)
        try:
            _note(alive, api)
            subprocess.Popen(
                _command(home, listener.fileno(), alive),
                pass_fds=(listener.fileno(), alive),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C is for the run; the server sees that the run has ended.
                start_new_session=True,
                env={**os.environ, **WITHOUT_PAGES},
            )
        finally:
            os.close(alive)
    return api


def serve(home: Path, listener: int, alive: int, names: Sequence[str] | None = None) -> None:
    """Serve on a listening socket until nobody has used the server for a while.

    Args:
        home: the project's folder for generated files.
        listener: descriptor of the socket.
        alive: descriptor whose lock says that the server runs.
        names: by which it may be called, of the server of `plumbline up`, which stays.
    """
    import uvicorn

    def application() -> App:
        with uncollected():
            from prefect.server.api.server import create_app

            app: Any = create_app()
        return Gate(app, names or LOOPBACK)

    server = uvicorn.Server(
        uvicorn.Config(
            application,
            factory=True,
            log_level="error",
            lifespan="on",
            # Pages keep a connection open as long as they are shown.
            timeout_graceful_shutdown=3,
        )
    )

    def watch() -> None:
        _wait_until_unused(home, alive)
        server.should_exit = True
        # A connection that stays open must not keep the process.
        time.sleep(LINGER_SECONDS)
        os._exit(0)

    if names is None:
        threading.Thread(target=watch, daemon=True).start()
    # Not by its descriptor, of which uvicorn makes a Unix socket, and sends every answer late.
    server.run(sockets=[socket.socket(fileno=listener)])


def _wait_until_unused(home: Path, alive: int) -> None:
    users = os.open(home / "prefect" / "server.users", os.O_RDWR | os.O_CREAT, 0o600)
    unused_since: float | None = None
    while True:
        time.sleep(0.5)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            unused_since = None
            continue
        unused_since = unused_since or time.monotonic()
        if time.monotonic() - unused_since > LINGER_SECONDS:
            # In this order: whoever joins from now on starts a server of their own.
            fcntl.flock(alive, fcntl.LOCK_UN)
            fcntl.flock(users, fcntl.LOCK_UN)
            return
        fcntl.flock(users, fcntl.LOCK_UN)


if __name__ == "__main__":
    named = sys.argv[4].split(",") if len(sys.argv) > 4 else None
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), named)
