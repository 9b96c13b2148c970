"""The processes that `plumbline up` starts: which they are, whether they live, and their end.

Imports no framework. Each process carries a mark in its environment, and so do all that it starts:
by it they are found, even where the one that started them is gone.
"""

import errno
import fcntl
import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from flows.services.hosts import in_url
from plumbline.errors import MachineError
from plumbline.process import alive, identity, pid_of

PREFECT, MLFLOW = "prefect", "mlflow"
HEALTH = {PREFECT: "/api/health", MLFLOW: "/health"}
"""Where a server says that it is well."""
WORKER = "worker-"
"""Begins the name of a worker; the name of its work pool follows."""

MARK = "PLUMBLINE_SERVICE"
"""Environment variable of every process of a service: its name, and the project's home."""
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable of the process that a worker starts for a run."""

CHECKPOINT_SECONDS = 30.0
"""How long a run may take to save its state, the same as after a cancellation in Prefect."""
SHOWN_OF_A_COMMAND = 160
SHOWN_OF_A_LOG = 2000


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{in_url(host)}:{self.port}"


class Service(BaseModel):
    """A service as it was started."""

    model_config = ConfigDict(frozen=True)

    process: str
    """Identity of its main process."""
    since: str
    """When it was started, UTC."""
    log: str
    """HOME/services/NAME.log."""
    address: Address | None = None
    """Of a server."""
    names: tuple[str, ...] = ()
    """Of a server: by which it may be called, beside those of its address."""
    api: str | None = None
    """Of the Prefect server that a worker works for."""

    @property
    def pid(self) -> int:
        """Number of its main process."""
        return int(pid_of(self.process))

    @property
    def alive(self) -> bool:
        """Whether its main process lives.

        Of what was started under another name of this host, or in a container that was made anew
        since, the number says nothing: it lives if its processes are here, or if it answers.
        """
        here = alive(self.process)
        if here is not None:
            return here
        log = Path(self.log)
        if members(log.parents[1], log.stem):
            return True
        return self.address is not None and answers(self.address.url + HEALTH[log.stem])


class State(BaseModel):
    """What `plumbline up` has started and deployed, as services.json keeps it."""

    services: dict[str, Service] = {}
    server: str = ""
    """API of the Prefect server that the rest is in; empty for this project's own."""
    deployed: str = ""
    """Digest of what the deployments were made from."""
    deployments: dict[str, list[str]] = {}
    """By their names, with their flows' (align/quickstart): the names of their schedules."""
    automation: str = ""
    """Digest of what the automation of changed data was made from."""

    def enter(self, server: str) -> None:
        """Forget what is deployed where that was in another server."""
        if server != self.server:
            self.server, self.deployed, self.deployments, self.automation = server, "", {}, ""


def read_state(home: Path) -> State:
    """What is recorded; nothing where there is no record that can be read."""
    try:
        return State.model_validate_json((home / "services.json").read_bytes())
    except (OSError, ValidationError):
        return State()


def write_state(home: Path, state: State) -> None:
    """Replace the record, all at once."""
    aside = home / f".services.json.{os.getpid()}"
    aside.write_text(state.model_dump_json(indent=1) + "\n")
    aside.replace(home / "services.json")


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Let one `plumbline up` or `down` at a time work on a project's services.

    Raises:
        MachineError: another one is at it.
    """
    with (home / "services.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                "Another `plumbline up` or `plumbline down` is at work on this project. "
                "Wait until it is done, then try again."
            ) from None
        yield


def launch(
    home: Path,
    name: str,
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    address: Address | None = None,
    names: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
) -> Service:
    """Start a service in a session of its own, so that it outlives this process and its terminal.

    Its log is new; the one before is kept beside it.
    """
    log = home / "services" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **env, "PLUMBLINE_HOME": str(home), MARK: _mark(home, name)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Service(
        process=identity(process.pid),
        since=since,
        log=str(log),
        address=address,
        names=tuple(names),
    )


def members(home: Path, name: str | None = None) -> list[psutil.Process]:
    """The living processes of a service, or of all, with whatever these have started."""
    wanted = _mark(home, name or "")
    found = []
    for process in psutil.process_iter():
        mark = environment(process).get(MARK, "")
        if mark == wanted or (name is None and mark.endswith(wanted)):
            found.append(process)
    return [process for process in found if lives(process) and process.pid != os.getpid()]


def service_names(home: Path) -> list[str]:
    """The services that have living processes."""
    marks = {environment(process).get(MARK, "") for process in members(home)}
    return sorted(mark.partition("@")[0] for mark in marks if mark)


def _mark(home: Path, name: str) -> str:
    return f"{name}@{home}"


def environment(process: psutil.Process) -> dict[str, str]:
    """What a process was started with; empty where this user may not see it, or it is gone."""
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}


def lives(process: psutil.Process) -> bool:
    """Whether a process runs, or could again; one that nobody has buried yet does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """End processes: SIGTERM, and SIGKILL for those that are left after a while.

    Returns those that had to be killed.
    """
    processes = [*processes]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
            # One that is held hears of it only then.
            process.resume()
    left = _wait(processes, seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _wait(left, 5.0)
    return left


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for the end of processes; returns those that are left."""
    deadline = time.monotonic() + seconds
    while (left := [one for one in processes if lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def check_free(address: Address, option: str) -> None:
    """Check that a server could listen somewhere.

    Args:
        address: where.
        option: of the command line that chooses the port.

    Raises:
        MachineError: the port is in use, or the host is none of this machine's.
    """
    listen(address, option).close()


def listen(address: Address, option: str) -> socket.socket:
    """A listening socket (raises as `check_free`)."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"{option} {address.port}: expected a free port, got one that is in use by "
                f"{port_owner(address.port)}. End it, or choose another port with {option}."
            ) from None
        raise MachineError(
            f"Can't listen at {address.host}, port {address.port} ({error.strerror or error}): "
            f"expected an address of this machine for --host, and a port for {option} that "
            f"{getpass.getuser()} may use (from 1024 on)."
        ) from None


def port_owner(port: int) -> str:
    """Who listens at a port, in words: number and command of the process."""
    with suppress(psutil.AccessDenied):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr.port == port and connection.pid:
                return f"process {connection.pid} ({_command(connection.pid)})"
    return "a process of another user"


def _command(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return "it has just ended"
    cut = command[: SHOWN_OF_A_COMMAND - 1] + "…"
    return command if len(command) <= SHOWN_OF_A_COMMAND else cut


def answers(url: str) -> bool:
    """Whether a server answers a GET as it should, within two seconds."""
    # A proxy of the environment is for other machines.
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2):
            return True
    except (HTTPError, URLError, OSError):
        return False


def wait_until_answers(name: str, service: Service, url: str, seconds: float) -> None:
    """Wait until a server answers.

    Raises:
        MachineError: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + seconds
    while not answers(url):
        if not service.alive:
            raise MachineError(f"{name} ended as it started. {log_tail(service)}")
        if time.monotonic() > deadline:
            raise MachineError(
                f"{name} did not answer at {url} within {seconds:.0f} s. `plumbline down` ends it. "
                f"{log_tail(service)}"
            )
        time.sleep(0.1)


def log_tail(service: Service) -> str:
    """Where a service's log is, and how it ends."""
    log = Path(service.log)
    said = log.read_text(errors="replace")[-SHOWN_OF_A_LOG:].strip() if log.exists() else ""
    return f"Its log, {log}, ends:\n{said}" if said else f"Its log, {log}, is empty."
