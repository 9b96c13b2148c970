"""Tests of flows.services.deploying against a Prefect server: pools, schedules, what waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.services import deploying
from flows.services.processes import State
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


def test_what_is_deployed_in_one_server_counts_for_no_other():
    state = State(deployed="abc", deployments={"align/tiny": []}, automation="def")

    state.enter("")
    assert state.deployed == "abc"
    state.enter("http://team.example/api")

    assert state == State(server="http://team.example/api")
