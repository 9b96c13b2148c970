"""Closing what dead processes left open: runs in MLflow and in Prefect that nobody works on."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.context import SyncClientContext
from prefect.states import Crashed

from plumbline.process import alive, identity, pid_of
from tasks import tracking
from tasks.delivery import send_orphans
from tasks.faults import passing, root_cause
from tasks.progress import show_warning

PROCESS_TAG = "process:"
"""Begins the tag of a flow run that says which process it runs in."""
OPEN_STATES = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
PAGE = 200


def process_tag() -> str:
    """The tag of a flow run of this process."""
    return PROCESS_TAG + identity()


def tag_flow_run() -> None:
    """Tag the flow run of this context as this process's, where something else made the run.

    A run that is tried again has another process each time, and only the last tag is true.
    """
    tags = [tag for tag in runtime.flow_run.tags if not tag.startswith(PROCESS_TAG)]
    with SyncClientContext.get_or_create() as context:
        context.client.update_flow_run(runtime.flow_run.id, tags=[*tags, process_tag()])


def close_dead_runs(home: Path) -> None:
    """Close every run that a dead process left open, once what it had logged is in MLflow.

    Runs of living processes, and of other hosts, stay as they are.

    Args:
        home: the project's folder for generated files.

    Raises:
        TrainingError: MLflow did not answer in time.
    """
    send_orphans()
    for run_id, process in tracking.running(home):
        if alive(process) is False:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            tracking.kill_run(run_id, f"{when}: found that process {pid_of(process)} had died")
    try:
        _crash_dead_flow_runs()
    except Exception as error:
        if not passing(error):
            raise
        show_warning(f"Prefect does not answer ({root_cause(error)}); dead runs stay open in it")


def _crash_dead_flow_runs() -> None:
    # Inside a flow run this is the run's own client; to make one takes longer than to ask it.
    with SyncClientContext.get_or_create() as context:
        client = context.client
        for flow_run, process in [*_open_flow_runs(client)]:
            if alive(process) is not False:
                continue
            message = f"process {pid_of(process)} died; run again to resume"
            for task_run in _open_task_runs(client, flow_run):
                client.set_task_run_state(task_run.id, Crashed(message=message), force=True)
            client.set_flow_run_state(flow_run.id, Crashed(message=message), force=True)


def _open_flow_runs(client: SyncPrefectClient) -> Iterator[tuple[Any, str]]:
    """The flow runs that are under way, with their processes."""
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN_STATES)),
        tags=FlowRunFilterTags(is_null_=False),
    )
    for page in _pages(client.read_flow_runs, flow_run_filter=wanted):
        for flow_run in page:
            for tag in flow_run.tags:
                if tag.startswith(PROCESS_TAG):
                    yield flow_run, tag.removeprefix(PROCESS_TAG)


def _open_task_runs(client: SyncPrefectClient, flow_run: Any) -> list[Any]:
    unfinished = [state for state in StateType if state not in TERMINAL_STATES]
    wanted = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=unfinished)))
    below = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    pages = _pages(client.read_task_runs, flow_run_filter=below, task_run_filter=wanted)
    return [task_run for page in pages for task_run in page]


def _pages(read: Any, **filters: Any) -> Iterator[list[Any]]:
    offset = 0
    while page := read(**filters, limit=PAGE, offset=offset):
        yield page
        if len(page) < PAGE:
            return
        offset += PAGE
