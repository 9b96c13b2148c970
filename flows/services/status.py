"""`plumbline status`: what is up, and what the Prefect server has to do."""

import os
from typing import Any, Literal

from pydantic import BaseModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from flows.environment import database_uri
from flows.services.processes import (
    HEALTH,
    MLFLOW,
    PREFECT,
    WORKER,
    Service,
    State,
    answers,
    read_state,
)
from plumbline.addresses import without_credentials
from plumbline.project import Project

Word = Literal["up", "down", "died", "does not answer", "named"]
COLOURS: dict[Word, str] = {"up": "green", "named": "cyan", "down": "yellow"}
GOOD = ("up", "named")


class ServiceStatus(BaseModel):
    """One service."""

    state: Word
    """named: a server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is used."""
    url: str | None = None
    pid: int | None = None
    since: str | None = None
    log: str | None = None


class Status(BaseModel):
    """All services, and what the Prefect server knows while it answers."""

    up: bool
    services: dict[str, ServiceStatus]
    deployments: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    """Flow runs in progress, or that should be."""


def running_url(project: Project, name: str) -> str | None:
    """Where a server of `plumbline up` is, while its process lives."""
    service = read_state(project.home).services.get(name)
    return service.address.url if service and service.address and service.alive else None


def find_status(project: Project, named: dict[str, str]) -> Status:
    """Look at everything that `plumbline up` starts.

    Args:
        project: the project.
        named: the servers that the environment named before anything was set, by service.
    """
    state = read_state(project.home)
    workers = {WORKER + "local", *(n for n in state.services if n.startswith(WORKER))}
    services = {
        name: _named(named[name]) if name in named else _status(state, name)
        for name in (PREFECT, MLFLOW, *sorted(workers))
    }
    found = Status(up=all(one.state in GOOD for one in services.values()), services=services)
    if services[PREFECT].state not in GOOD:
        return found
    os.environ.setdefault("PREFECT_API_URL", f"{services[PREFECT].url}/api")
    from flows.services import deploying

    found.deployments = deploying.deployments()
    found.runs = deploying.runs_under_way()
    return found


def named_servers(project: Project) -> dict[str, str]:
    """The servers other than its own that the environment names; none is started for these."""
    named = {}
    api = os.environ.get("PREFECT_API_URL", "")
    if api and api.rstrip("/") != f"{running_url(project, PREFECT)}/api":
        named[PREFECT] = api
    store = tracking_uri(project)
    # A store that is no server can still be shown by one.
    served = store.startswith(("http://", "https://", "databricks"))
    if served and store.rstrip("/") != running_url(project, MLFLOW):
        named[MLFLOW] = store
    return named


def tracking_uri(project: Project) -> str:
    """The MLflow store of the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI", database_uri(project.home))


def _named(url: str) -> ServiceStatus:
    ok = not url.startswith("http") or answers(f"{url.rstrip('/')}/health")
    state: Word = "named" if ok else "does not answer"
    return ServiceStatus(state=state, url=without_credentials(url))


def _status(state: State, name: str) -> ServiceStatus:
    service = state.services.get(name)
    if service is None:
        return ServiceStatus(state="down")
    return ServiceStatus(
        state=_word(service, name),
        url=service.address.url if service.address else None,
        pid=service.pid,
        since=service.since,
        log=service.log,
    )


def _word(service: Service, name: str) -> Word:
    if not service.alive:
        return "died"
    if service.address and not answers(service.address.url + HEALTH[name]):
        return "does not answer"
    return "up"


def show_status(console: Console, found: Status) -> None:
    """Print the status as tables."""
    table = Table("service", "state", "where", "process", "since (UTC)", box=None, pad_edge=False)
    for name, one in found.services.items():
        table.add_row(
            name,
            Text(one.state, COLOURS.get(one.state, "red")),
            one.url or "",
            str(one.pid or ""),
            (one.since or "")[:19].replace("T", " "),
        )
    console.print(table)
    if found.deployments:
        console.print()
        console.print(_deployments(found))
    if found.runs:
        console.print()
        console.print(_runs(found))
    elif found.services[PREFECT].state in GOOD:
        console.print("\nNo run in progress.")


def _deployments(found: Status) -> Table:
    table = Table("deployment", "pool", "schedule", "", box=None, pad_edge=False)
    for one in found.deployments:
        for schedule in one["schedules"] or [None]:
            words = Text("none", "dim") if schedule is None else Text(schedule["when"])
            on = schedule is not None and schedule["active"] and not one["paused"]
            state = "" if schedule is None else "active" if on else "paused"
            pool = Text(one["pool"] or "none")
            if one["pool"] and not one["worker"]:
                pool.append(" (no worker)", "yellow")
            table.add_row(one["name"], pool, words, Text(state, "green" if on else "dim"))
    return table


def _runs(found: Status) -> Table:
    # Ids are there to be copied, so that they go on in the next line sooner than lose an end.
    identity = Column("id", overflow="fold")
    table = Table("run", "state", "deployment", "since", identity, box=None, pad_edge=False)
    for run in found.runs:
        state = Text(run["state"], "yellow" if run["waits"] else "")
        since = (run["since"] or "")[:19].replace("T", " ")
        table.add_row(run["name"], state, run["deployment"] or "", since, run["id"])
    return table
