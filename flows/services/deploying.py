"""Work pools, the limit of the GPU, and the deployments of prefect.yaml, in the Prefect server.

To be imported once PREFECT_API_URL names the server.
"""

import hashlib
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    Operator,
)
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from flows.services.deployment_file import read_deployments
from plumbline.errors import MachineError, PlumblineError
from plumbline.params import schema
from plumbline.project import Project

GPU_LIMIT = "gpu"
"""Name of the concurrency limit that lets one step at a time compute on the GPU."""
PAGE = 200
UNDER_WAY = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
WAITING = ["Late", "AwaitingConcurrencySlot", "AwaitingRetry"]
"""Names of scheduled runs that should be at work: no worker, no place, or a failure before."""


class Pool(NamedTuple):
    """A work pool that `plumbline up` makes."""

    description: str
    limit: int
    """Runs at a time, at first; it may be changed in the UI."""


POOLS = {
    "local": Pool(
        "Runs on this machine's CPUs, in processes that `plumbline up`'s worker starts.", 4
    ),
    "gpu": Pool("Runs that need a GPU, one after the other.", 1),
}


def make_pools(project: Project, *, own: bool) -> None:
    """Make the work pools and the concurrency limit, and let the pools run this project's code.

    Args:
        project: the project.
        own: whether the server is this project's alone.

    Raises:
        MachineError: the pools of a server that is shared run another project's code.
    """
    template = job_template(project.root)
    with get_client(sync_client=True) as client:
        for name, pool in POOLS.items():
            try:
                found = client.read_work_pool(name)
            except ObjectNotFound:
                client.create_work_pool(
                    WorkPoolCreate(
                        name=name,
                        type="process",
                        description=pool.description,
                        base_job_template=template,
                        concurrency_limit=pool.limit,
                    )
                )
                continue
            if not own:
                _check_ours(found, project)
            if found.type == "process" and found.base_job_template != template:
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
        try:
            client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1)
            )


def _check_ours(pool: Any, project: Project) -> None:
    """Check that the runs of a pool that is there are not another project's."""
    variables = pool.base_job_template.get("variables", {}).get("properties", {})
    theirs = variables.get("working_dir", {}).get("default")
    if pool.type == "process" and theirs not in (None, str(project.root)):
        raise MachineError(
            f"The work pool {pool.name} of the Prefect server that PREFECT_API_URL names belongs "
            f"to the project at {theirs}, expected {project.root}: pools and deployments have one "
            "name in all projects. Use another server (unset PREFECT_API_URL for one of this "
            "project's own); or, if the project was moved here, delete the pool, then try again: "
            f"prefect work-pool delete {pool.name}"
        )


def job_template(root: Path) -> dict[str, Any]:
    """How a worker of a pool starts a run: this Python, in the project's folder.

    A command that is given is run as it is. Without one, Prefect would put a process of its own
    between the worker and the run.
    """
    variables = {
        "command": {
            "type": "string",
            "title": "Command",
            "description": "What starts a run.",
            "default": shlex.join([sys.executable, "-m", "prefect.engine"]),
        },
        "working_dir": {
            "type": "string",
            "title": "Working Directory",
            "description": "The project's folder.",
            "default": str(root),
        },
        "env": {
            "type": "object",
            "title": "Environment Variables",
            "description": "Added to the worker's own. Shown to everybody: no place for secrets.",
            "additionalProperties": {"type": "string"},
        },
        "stream_output": {
            "type": "boolean",
            "title": "Stream Output",
            "description": "Write what a run prints to the worker's log.",
            "default": True,
        },
    }
    return {
        "job_configuration": {name: "{{ " + name + " }}" for name in variables},
        "variables": {"type": "object", "properties": variables},
    }


def worker_name(project: Project) -> str:
    """The name of this project's workers, the same after each start."""
    return f"{project.root.name}@{platform.node()}".replace("/", "-").replace("%", "-")


def worker_heartbeat(pool: str, name: str) -> str | None:
    """When a worker last told the server that it lives, ISO; None if it never did."""
    with get_client(sync_client=True) as client:
        for worker in client.read_workers_for_work_pool(pool):
            if worker.name == name and worker.last_heartbeat_time is not None:
                return str(worker.last_heartbeat_time.isoformat())
    return None


# Deployments.


def wanted_digest(project: Project) -> str:
    """Digest of all that deployments are made from: prefect.yaml, the flows, params/'s names."""
    digest = hashlib.sha256((project.root / "prefect.yaml").read_bytes())
    for folder in (Path(__file__).parents[1], Path(schema.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    names = sorted(path.name for path in project.params.glob("*.yaml"))
    digest.update("/".join([sys.executable, *names]).encode())
    return digest.hexdigest()


def missing(project: Project) -> set[str]:
    """Deployments of prefect.yaml that the server does not have, by their own names."""
    with get_client(sync_client=True) as client:
        return set(read_deployments(project.root)) - {found.name for found in _deployments(client)}


def deploy(project: Project, before: dict[str, list[str]]) -> dict[str, list[str]]:
    """Make the server's deployments those of prefect.yaml.

    What was done to schedules in the UI stays: whether one is active is decided there, prefect.yaml
    says only how it starts out; and one that was added there stays as it is.

    Args:
        project: the project.
        before: what an earlier call returned; of it, what prefect.yaml no longer has goes.

    Returns:
        the deployments by their names, with their flows' (align/quickstart), and the names of their
        schedules.

    Raises:
        PlumblineError: Prefect refused one.
    """
    wanted = read_deployments(project.root)
    with get_client(sync_client=True) as client:
        known = {_full_name(client, one): one for one in _deployments(client)}
        for name, deployment in known.items():
            ours = before.get(name, [])
            for schedule in deployment.schedules:
                if schedule.slug in ours and schedule.slug not in wanted.get(deployment.name, []):
                    client.delete_deployment_schedule(deployment.id, schedule.id)
            if name in before and deployment.name not in wanted:
                client.delete_deployment(deployment.id)
    try:
        _run_prefect_deploy(project)
    finally:
        # Also of those that were deployed before it failed.
        with get_client(sync_client=True) as client:
            made = {_full_name(client, one): one for one in _deployments(client)}
            for name in made.keys() & known.keys():
                _restore_schedules(client, made[name], known[name].schedules)
    return {name: wanted[one.name] for name, one in made.items() if one.name in wanted}


def _run_prefect_deploy(project: Project) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)
    # What it can't read of the file, it leaves out with a warning.
    if done.returncode or (left_out := missing(project)):
        what = "failed" if done.returncode else f"left out {', '.join(sorted(left_out))}"
        said = (done.stdout + done.stderr)[-2000:].strip()
        raise PlumblineError(
            f"`prefect deploy --all` {what}; mend prefect.yaml, then run `plumbline up` again. "
            f"It said:\n{said}"
        )


def _restore_schedules(client: SyncPrefectClient, deployment: Any, before: list[Any]) -> None:
    """Bring back what deploying has undone of the schedules that were there before."""
    now = {schedule.slug: schedule for schedule in deployment.schedules}
    for schedule in before:
        if schedule.slug is None and schedule.schedule not in [s.schedule for s in now.values()]:
            added = [(schedule.schedule, schedule.active)]
            client.create_deployment_schedules(deployment.id, added, parameters=schedule.parameters)
        elif schedule.slug in now and now[schedule.slug].active != schedule.active:
            found = now[schedule.slug]
            client.update_deployment_schedule(deployment.id, found.id, active=schedule.active)


def _deployments(client: SyncPrefectClient) -> list[Any]:
    found: list[Any] = []
    while page := client.read_deployments(limit=PAGE, offset=len(found)):
        found += page
        if len(page) < PAGE:
            break
    return found


def _full_name(client: SyncPrefectClient, deployment: Any) -> str:
    return f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"


# What the server knows, for `plumbline status`.


def deployments() -> list[dict[str, Any]]:
    """The deployments with their pools, whether a worker serves these, and schedules."""
    with get_client(sync_client=True) as client:
        deployed = _deployments(client)
        pools = {found.work_pool_name for found in deployed}
        served = {pool for pool in pools if pool and _has_worker(client, pool)}
        listed = [
            {
                "name": _full_name(client, found),
                "pool": found.work_pool_name,
                "worker": found.work_pool_name in served,
                "paused": found.paused,
                "schedules": [
                    {"slug": s.slug, "when": _when(s.schedule), "active": s.active}
                    for s in found.schedules
                ],
            }
            for found in deployed
        ]
    return sorted(listed, key=lambda one: str(one["name"]))


def _has_worker(client: SyncPrefectClient, pool: str) -> bool:
    return any(one.status == "ONLINE" for one in client.read_workers_for_work_pool(pool))


def _when(schedule: Any) -> str:
    for name in ("cron", "rrule", "interval"):
        if value := getattr(schedule, name, None):
            return f"{name} {value} {getattr(schedule, 'timezone', None) or ''}".strip()
    return str(schedule)


def runs_under_way() -> list[dict[str, Any]]:
    """The flow runs that are in progress, or should be, the newest first."""
    state = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=UNDER_WAY), name=FlowRunFilterStateName(any_=WAITING)
    )
    state.operator = Operator.or_
    with get_client(sync_client=True) as client:
        runs: list[Any] = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=state), limit=PAGE
        )
        ids = [run.deployment_id for run in runs if run.deployment_id]
        wanted = DeploymentFilter(id=DeploymentFilterId(any_=ids))
        found = client.read_deployments(deployment_filter=wanted) if ids else []
        names = {one.id: one.name for one in found}
    runs.sort(key=lambda run: run.created or run.expected_start_time, reverse=True)
    return [
        {
            "id": str(run.id),
            "name": run.name,
            "state": run.state_name,
            "waits": run.state_name in WAITING,
            "deployment": names.get(run.deployment_id),
            "since": run.start_time.isoformat() if run.start_time else None,
        }
        for run in runs
    ]


def close_run(flow_run_id: str, message: str) -> None:
    """Mark a flow run whose process was ended, unless it has marked itself."""
    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(UUID(flow_run_id))
        except (ObjectNotFound, ValueError):
            return
        if run.state is None or run.state.type in TERMINAL_STATES:
            return
        made = Cancelled if run.state.is_cancelling() else Crashed
        client.set_flow_run_state(run.id, made(message=message), force=True)


def check_reachable(api: str) -> None:
    """Check that the server answers.

    Raises:
        MachineError: it does not.
    """
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise MachineError(
                f"Prefect's server at {api} does not answer ({error}): expected a server that "
                "runs. Start it, or unset PREFECT_API_URL."
            )
