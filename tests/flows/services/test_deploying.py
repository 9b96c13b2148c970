"""Tests of flows.services.deploying against a Prefect server: pools, schedules, what waits."""

from __future__ import annotations

import io
from collections.abc import Iterator
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running, Scheduled
from rich.console import Console

from flows.services import deploying
from flows.services.processes import State
from flows.services.status import Status, _deployments, _runs
from plumbline.errors import MachineError
from plumbline.project import Project


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """Of a server without pools, before the test and after it."""
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:
        yield client
        for found in client.read_deployments():
            client.delete_deployment(found.id)
        for pool in client.read_work_pools():
            client.delete_work_pool(pool.name)


def test_the_pools_of_another_project_are_not_taken_over(client, tmp_path):
    theirs, ours = (Project(tmp_path / name, tmp_path / name) for name in ("theirs", "ours"))
    deploying.make_pools(theirs, own=False)
    deploying.make_pools(theirs, own=False)

    with pytest.raises(MachineError, match=rf"belongs to the project at {theirs.root}, expected"):
        deploying.make_pools(ours, own=False)

    assert client.read_work_pool("local").base_job_template == deploying.job_template(theirs.root)
    # A project that was moved takes its own server along.
    deploying.make_pools(ours, own=True)
    assert client.read_work_pool("local").base_job_template == deploying.job_template(ours.root)


def deployed(client: SyncPrefectClient, *, active: bool) -> UUID:
    """A deployment as `prefect deploy` makes it: what was there of it is replaced."""
    schedule = DeploymentScheduleCreate(
        schedule=CronSchedule(cron="0 2 * * *"), active=active, slug="nightly"
    )
    flow = client.create_flow_from_name("align")
    return client.create_deployment(flow, "tiny", schedules=[schedule], work_pool_name="local")


def test_runs_that_wait_are_shown_and_pools_that_nobody_serves(client, tmp_path):
    deploying.make_pools(Project(tmp_path, tmp_path), own=True)
    deployment = deployed(client, active=False)
    states = [Scheduled(name=name) for name in (*deploying.WAITING, "Scheduled")]
    states += [Running(), Completed()]
    for state in states:
        run = client.create_flow_run_from_deployment(deployment)
        client.set_flow_run_state(run.id, state, force=True)

    runs = {run["state"]: run["waits"] for run in deploying.runs_under_way()}
    (listed,) = deploying.deployments()

    assert runs == dict.fromkeys(deploying.WAITING, True) | {"Running": False}
    assert not listed["worker"]
    shown = Console(width=200, file=io.StringIO())
    found = Status(up=False, services={}, deployments=[listed], runs=deploying.runs_under_way())
    shown.print(_deployments(found))
    shown.print(_runs(found))
    assert "local (no worker)" in shown.file.getvalue()
    assert "AwaitingConcurrencySlot" in shown.file.getvalue()
    client.send_worker_heartbeat("local", "here", heartbeat_interval_seconds=30)
    assert deploying.deployments()[0]["worker"]


def test_where_deploying_fails_schedules_stay_on(client, tmp_path, monkeypatch):
    deploying.make_pools(Project(tmp_path, tmp_path), own=True)
    (tmp_path / "prefect.yaml").write_text("deployments: [{name: tiny}]\n")
    deployed(client, active=True)

    def stopped(project: Project) -> None:
        deployed(client, active=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(deploying, "_run_prefect_deploy", stopped)
    with pytest.raises(KeyboardInterrupt):
        deploying.deploy(Project(tmp_path, tmp_path), {})

    ((schedule,),) = [found.schedules for found in client.read_deployments()]
    assert schedule.active


def test_what_is_deployed_in_one_server_counts_for_no_other():
    state = State(deployed="abc", deployments={"align/tiny": []}, automation="def")

    state.enter("")
    assert state.deployed == "abc"
    state.enter("http://team.example/api")

    assert state == State(server="http://team.example/api")
