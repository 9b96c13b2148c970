"""`plumbline up`: start what is not there, repair what died, and deploy what changed."""

import getpass
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from flows.environment import database_uri
from flows.services import prefect_server
from flows.services.deployment_file import read_deployments
from flows.services.hosts import check_names, in_url, is_loopback, names_of
from flows.services.processes import (
    CHECKPOINT_SECONDS,
    HEALTH,
    MLFLOW,
    PREFECT,
    WORKER,
    Address,
    Service,
    State,
    alone,
    check_free,
    end,
    launch,
    listen,
    log_tail,
    members,
    read_state,
    service_names,
    wait_until_answers,
    write_state,
)
from flows.services.status import named_servers, tracking_uri
from plumbline.addresses import without_credentials
from plumbline.errors import MachineError
from plumbline.project import Project
from tasks.templates import opening

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORTS = {PREFECT: 4200, MLFLOW: 5000}
VARIABLES = {PREFECT: "PREFECT_API_URL", MLFLOW: "MLFLOW_TRACKING_URI"}
"""What names a server that is used in place of one's own."""
START_SECONDS = 120.0
REMAINS_SECONDS = 5.0

Say = Callable[[str], None]
"""Takes a line that tells how far the work has come."""


class Wanted(NamedTuple):
    """What the command line asks for; None means as it is, or as it was, or the default."""

    host: str | None = None
    ports: Mapping[str, int | None] = {}
    """Of the servers, by their names."""
    names: tuple[str, ...] = ()
    """By which both may be called, beside those of their addresses; none means as before."""


def bring_up(project: Project, wanted: Wanted, say: Say, warn: Say) -> None:
    """Bring all services up and deploy prefect.yaml; what is there already stays as it is.

    Servers that PREFECT_API_URL and MLFLOW_TRACKING_URI name are used, and none is started for
    them.

    Raises:
        ParamsError: prefect.yaml can't be read.
        MachineError: a port is in use, or a service does not start.
        PlumblineError: Prefect refused a deployment.
    """
    home = project.home
    check_names(wanted.names)
    read_deployments(project.root)
    with alone(home):
        state = read_state(home)
        servers = _servers(project)
        for name in VARIABLES.keys() - set(servers):
            _check_named(state, name, wanted)
        missing = {name: _address(state, name, wanted) for name in servers}
        _end_remains(home, state)
        to_start = {name: address for name, address in missing.items() if address is not None}
        _check_ports(to_start)
        for name, address in to_start.items():
            if not is_loopback(address.host):
                warn(exposure(name, address))
        _start_servers(project, state, to_start, wanted.names, say)
        _go_on_in_prefect(project, state, say)


def _check_named(state: State, name: str, wanted: Wanted) -> None:
    """Check that nothing is asked of a server that is not this project's own."""
    if (port := wanted.ports.get(name)) is not None:
        raise MachineError(
            f"{option(name)} {port}: expected no port, since {VARIABLES[name]} names a server; "
            "leave out the one or the other"
        )
    recorded = state.services.get(name)
    if recorded is not None and recorded.alive:
        raise MachineError(
            f"{VARIABLES[name]} names a server, and this project's own runs (process "
            f"{recorded.pid}): expected one of them. Unset it, or run `plumbline down` first."
        )


def _servers(project: Project) -> list[str]:
    """The servers that this project needs of its own."""
    named = named_servers(project)
    return [name for name in DEFAULT_PORTS if name not in named]


def _address(state: State, name: str, wanted: Wanted) -> Address | None:
    """Where a server is to be started; None where it runs already.

    Raises:
        MachineError: it runs, and elsewhere than it should.
    """
    recorded = state.services.get(name)
    before = recorded.address if recorded else None
    host, port = wanted.host, wanted.ports.get(name)
    if recorded is None or before is None or not recorded.alive:
        known = before or Address(DEFAULT_HOST, DEFAULT_PORTS[name])
        return Address(host or known.host, port or known.port)
    if wanted.names and set(wanted.names) != set(recorded.names):
        names = ", ".join(recorded.names) or "none"
        raise MachineError(
            f"{name} runs already, with the names {names}, expected {', '.join(wanted.names)}. "
            "Run `plumbline down` first."
        )
    asked = Address(host or before.host, port or before.port)
    if asked != before:
        raise MachineError(
            f"{name} runs at {in_url(before.host)}:{before.port} already, expected to start it at "
            f"{in_url(asked.host)}:{asked.port}. Run `plumbline down` first."
        )
    return None


def _end_remains(home: Path, state: State) -> None:
    """End what is left of services that died, or whose record is gone."""
    for name in service_names(home):
        recorded = state.services.get(name)
        if recorded is None or not recorded.alive:
            # A run that lost its worker fails at the next line that it prints; now it can save.
            seconds = CHECKPOINT_SECONDS if name.startswith(WORKER) else REMAINS_SECONDS
            end(members(home, name), seconds)


def _check_ports(to_start: Mapping[str, Address]) -> None:
    ports = [address.port for address in to_start.values()]
    if len(set(ports)) < len(ports):
        raise MachineError(
            f"expected different ports for Prefect and MLflow, got {ports[0]} for both"
        )
    for name, address in to_start.items():
        check_free(address, option(name))


def option(name: str) -> str:
    """The option that chooses a server's port."""
    return f"--{name}-port"


def exposure(name: str, address: Address) -> str:
    """What becomes reachable where a server listens beyond this machine."""
    means = {
        PREFECT: f"start and cancel runs, read their logs, and run any command as "
        f"{getpass.getuser()}, since a deployment is one",
        MLFLOW: "read, change and delete runs, models and files",
    }
    return (
        f"WARNING: {name} will listen at {address.host}, port {address.port}, with no password. "
        f"Whoever reaches that port of {platform.node()} can {means[name]}. Keep it behind a "
        "firewall or a proxy that asks who comes, or leave --host out and use `ssh -L "
        f"{address.port}:127.0.0.1:{address.port} {platform.node()}`."
    )


def _start_servers(
    project: Project,
    state: State,
    to_start: Mapping[str, Address],
    names: Sequence[str],
    say: Say,
) -> None:
    """Start the servers beside each other, and wait until both answer."""
    home = project.home
    before = state.services
    names_for = {name: names or (before[name].names if name in before else ()) for name in to_start}
    with ExitStack() as until_open:
        if address := to_start.get(PREFECT):
            say(f"starting Prefect at {address.url} …")
            _note(home, state, PREFECT, _start_prefect(project, address, names_for[PREFECT]))
        if address := to_start.get(MLFLOW):
            say(f"starting MLflow at {address.url} …")
            if (uri := tracking_uri(project)).startswith("sqlite:///"):
                until_open.enter_context(opening("mlflow", Path(uri.removeprefix("sqlite:///"))))
            _note(home, state, MLFLOW, _start_mlflow(project, address, names_for[MLFLOW]))
        for name in (MLFLOW, PREFECT):
            service = state.services.get(name)
            if name in _servers(project) and service and service.address:
                url = service.address.url + HEALTH[name]
                wait_until_answers(name, service, url, START_SECONDS)


def _note(home: Path, state: State, name: str, service: Service) -> None:
    """Record a service at once, so that `down` knows of it whatever comes next."""
    state.services[name] = service
    write_state(home, state)


def _start_prefect(project: Project, address: Address, more: Sequence[str]) -> Service:
    def start(command: list[str], descriptors: tuple[int, ...]) -> Service:
        return launch(
            project.home, PREFECT, command, cwd=project.root, env=prefect_server.WITH_PAGES,
            address=address, names=more, pass_fds=descriptors,
        )  # fmt: skip

    api = f"{address.url}/api"
    names = names_of(address.host, more)
    with listen(address, option(PREFECT)) as listener:
        return prefect_server.start_lasting(project.home, listener, api, names, start)


def _start_mlflow(project: Project, address: Address, more: Sequence[str]) -> Service:
    names = [in_url(name) for name in names_of(address.host, more)]
    artifacts = project.home / "mlartifacts"
    env = {
        # Not on the command line: an address of a database can hold a password.
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(project),
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts.as_uri(),
        # Fifteen processes otherwise, for what this project does not use.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if tracking_uri(project) == database_uri(project.home):
        env["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = artifacts.as_uri()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", address.host, "--port", str(address.port)),
        # Its default takes names that begin like a private address, which anybody can register.
        *("--allowed-hosts", ",".join([*names, *(_at_any_port(name) for name in names)])),
        *("--cors-allowed-origins", ",".join(_origins(names))),
        "--uvicorn-opts=--no-access-log",
    ]
    return launch(
        project.home, MLFLOW, command, cwd=project.root, env=env, address=address, names=more
    )


def _at_any_port(name: str) -> str:
    """A pattern of MLflow's: a port that was forwarded to the server's own has another number."""
    return f"{name.replace('[', '[[]')}:*"


def _origins(names: Sequence[str]) -> list[str]:
    """The pages that may write, as MLflow matches them; a proxy may speak TLS."""
    return [
        f"{scheme}://{place}"
        for scheme in ("http", "https")
        for name in names
        for place in (name, _at_any_port(name))
    ]


def _go_on_in_prefect(project: Project, state: State, say: Say) -> None:
    """Make pools, start workers, deploy and automate, in the server that is there by now."""
    prefect = state.services.get(PREFECT)
    own = PREFECT in _servers(project)
    if own and prefect and prefect.address:
        os.environ["PREFECT_API_URL"] = f"{prefect.address.url}/api"
    from flows.services import deploying

    api = os.environ["PREFECT_API_URL"]
    deploying.check_reachable(api)
    deploying.make_pools(project, own=own)
    # Its own one has the same database wherever it listens.
    state.enter("" if own else without_credentials(api.rstrip("/")))
    started = [
        pool for pool in _pools_to_serve() if _start_worker(project, state, pool, say) is not None
    ]
    _deploy(project, state, say)
    _make_automation(project, state)
    for pool in started:
        _wait_for_worker(project, state.services[WORKER + pool], pool)


def _pools_to_serve() -> list[str]:
    # To ask PyTorch costs seconds, which only machines that can have a GPU are worth.
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
        return ["local"]
    from plumbline.training.device import training_device

    return ["local", "gpu"] if training_device().type == "cuda" else ["local"]


def _start_worker(project: Project, state: State, pool: str, say: Say) -> Service | None:
    """Start the worker of a pool, unless it lives."""
    from flows.services.deploying import worker_name

    api = os.environ["PREFECT_API_URL"]
    recorded = state.services.get(WORKER + pool)
    if recorded is not None and recorded.alive:
        if recorded.api != api:
            raise MachineError(
                f"The worker of the pool {pool} works for {recorded.api}, expected {api}. "
                "Run `plumbline down` first."
            )
        return None
    say(f"starting the worker of the pool {pool} …")
    command = [
        *(sys.executable, "-m", "prefect", "worker", "start", "--type", "process"),
        *("--pool", pool, "--name", worker_name(project), "--install-policy", "never"),
    ]
    env = {
        "PREFECT_API_URL": api,
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "2"),
        # Here the terminal is a log file, in which the worker and its runs say what they do.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
    }
    started = launch(project.home, WORKER + pool, command, cwd=project.root, env=env)
    service = started.model_copy(update={"api": api})
    _note(project.home, state, WORKER + pool, service)
    return service


def _wait_for_worker(project: Project, service: Service, pool: str) -> None:
    """Wait until the server has heard of a worker that was just started."""
    from flows.services.deploying import worker_heartbeat, worker_name

    since = datetime.fromisoformat(service.since)
    deadline = time.monotonic() + START_SECONDS
    while True:
        heard = worker_heartbeat(pool, worker_name(project))
        if heard is not None and datetime.fromisoformat(heard) >= since:
            return
        if not service.alive or time.monotonic() > deadline:
            raise MachineError(f"The worker of the pool {pool} did not start. {log_tail(service)}")
        time.sleep(0.2)


def _deploy(project: Project, state: State, say: Say) -> None:
    """Deploy prefect.yaml where it, or what it is made into, is not what the server has."""
    from flows.services.deploying import deploy, missing, wanted_digest

    digest = wanted_digest(project)
    if state.deployed == digest and not missing(project):
        return
    say("deploying prefect.yaml …")
    state.deployments = deploy(project, state.deployments)
    state.deployed = digest
    write_state(project.home, state)


def _make_automation(project: Project, state: State) -> None:
    """Let changed data start runs."""
    from flows.services.automating import make_automation

    state.automation = make_automation(state.automation)
    write_state(project.home, state)
