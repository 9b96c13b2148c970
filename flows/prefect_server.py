"""The Prefect server of runs that no other server was named for: one a project, while it is used.

The runs of a project share it. It ends by itself soon after the last of them, however that ended.

    python -m flows.prefect_server HOME LISTENER ALIVE      is how `join_server` starts it
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
from pathlib import Path

from plumbline.errors import MachineError
from tasks.templates import copy_template

LINGER_SECONDS = 3.0
"""How long a server waits for the next run before it ends."""
START_SECONDS = 120.0
"""The first start in a new home makes the database, which takes longest."""

WITHOUT_PAGES = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
}
"""Makes the server start sooner; the pages are for `prefect server start`, on the same database."""

_held: list[int] = []
"""Descriptors whose locks say that this process uses the server; they go with the process."""


def join_server(home: Path) -> None:
    """Point this process at the project's server, which is started where none runs.

    Returns before the server answers, so that the caller can import what it needs meanwhile. A
    server that PREFECT_API_URL names is used as it is. To be called before Prefect is imported.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    users = os.open(folder / "server.users", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(users, fcntl.LOCK_SH)
    _held.append(users)
    starting = os.open(folder / "server.starting", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(starting, fcntl.LOCK_EX)
    try:
        port = _running_port(folder)
        if port is None:
            copy_template("prefect", folder / "prefect.db")
            port = _start(home, folder)
    finally:
        os.close(starting)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"


def is_own() -> bool:
    """Whether this process uses the project's own server, which ends with it and has no pages."""
    return bool(_held)


def wait_for_server(home: Path) -> None:
    """Wait until the server answers.

    Raises:
        MachineError: it does not start, or a server that was named can't be reached.
    """
    api = os.environ["PREFECT_API_URL"]
    own = is_own()
    deadline = time.monotonic() + (START_SECONDS if own else 10.0)
    while time.monotonic() < deadline:
        try:
            # The port listens from the first moment, and a request waits in line.
            with urllib.request.urlopen(f"{api}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if own and _running_port(home / "prefect") is None:
                break
            time.sleep(0.1)
    log = home / "prefect" / "server.log"
    said = log.read_text(errors="replace")[-2000:] if own and log.exists() else ""
    raise MachineError(
        f"Prefect's server at {api} does not answer. "
        + (f"Its log, {log}, ends:\n{said}" if own else "Start it, or unset PREFECT_API_URL.")
    )


def _running_port(folder: Path) -> int | None:
    """The port of the project's server, or None where its process is gone."""
    try:
        with (folder / "server.alive").open() as alive:
            try:
                fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(json.load(alive)["port"])
    except (OSError, ValueError, KeyError):
        pass
    return None


def _start(home: Path, folder: Path) -> int:
    """Start the server in a process of its own; returns its port, which listens already."""
    with socket.socket() as listener, (folder / "server.log").open("ab") as log:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = int(listener.getsockname()[1])
        alive = os.open(folder / "server.alive", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # The lock is the server's, too, since it has the same open file.
            fcntl.flock(alive, fcntl.LOCK_EX)
            os.ftruncate(alive, 0)
            os.pwrite(alive, json.dumps({"port": port}).encode(), 0)
            command = [sys.executable, "-m", "flows.prefect_server", str(home)]
            subprocess.Popen(
                [*command, str(listener.fileno()), str(alive)],
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
    return port


def serve(home: Path, listener: int, alive: int) -> None:
    """Serve on a listening socket until nobody has used the server for a while.

    Args:
        home: the project's folder for generated files.
        listener: descriptor of the socket.
        alive: descriptor whose lock says that the server runs.
    """
    import uvicorn

    app = "prefect.server.api.server:create_app"
    server = uvicorn.Server(
        uvicorn.Config(app, factory=True, fd=listener, log_level="error", lifespan="on")
    )

    def watch() -> None:
        _wait_until_unused(home, alive)
        server.should_exit = True
        # A connection that stays open must not keep the process.
        time.sleep(LINGER_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    server.run()


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
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
