"""`plumbline up`, runs of its deployments through the worker, and `plumbline down`, for real."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from plumbline.data.splits import prompt_id, split_of
from plumbline.params.schema import Experiment, steps_of
from tasks.data_version import read_pin

if TYPE_CHECKING:
    from tests.conftest import SmallProject
    from tests.flows.conftest import Up

STEPS = steps_of(Experiment())
SECRET = "planted-7f3c1e-secret"
DEPLOYMENTS = """\
pull: []
deployments:
  - name: tiny
    description: Every step in a few seconds.
    tags: [test]
    entrypoint: flows.deployments.align.align
    parameters: {experiment: tiny}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
    schedules: [{slug: nightly, cron: "0 2 * * *", timezone: UTC, active: false}]
    work_pool: {name: local}
"""
WATCH = """\
  - name: data-watch
    tags: [test]
    entrypoint: flows.deployments.data_watch.data_watch
    parameters: {experiment: tiny}
    concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}
    work_pool: {name: local}
"""
LIMIT_OF_WATCH = "    concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}\n"
SECOND = """\
  - name: second
    entrypoint: flows.deployments.align.align
    parameters: {experiment: tiny}
    work_pool: {name: local}
  - name: promote
    entrypoint: flows.deployments.promote.promote
    enforce_parameter_schema: true
    work_pool: {name: local}
"""
SWEEP = """\
  - name: sweep
    entrypoint: flows.deployments.sweep.sweep
    parameters: {sweep: two}
    enforce_parameter_schema: true
    work_pool: {name: local}
"""
TWO = """\
sweep:
  experiment: tiny
  points: [{rl.kl_coef: 0.05}, {rl.rewards: {faulty:reward: 0.1}}]
"""
FAULTY = 'def reward(prompt, response):\n    raise ValueError("the scorer is broken")\n'
LONG = {"rl": {"episodes": 4800}}
"""An RL step of some thirty seconds."""


@pytest.fixture
def up(project: SmallProject, serve: Callable[..., AbstractContextManager[Up]]) -> Iterator[Up]:
    (project.root / "prefect.yaml").write_text(DEPLOYMENTS + WATCH)
    with serve(project, PLUMBLINE_TEST_SECRET=SECRET) as up:
        yield up


def of_the_home(project: SmallProject) -> list[psutil.Process]:
    """The processes that were told to work on the project, other than by the mark of services."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("PLUMBLINE_HOME") == str(project.home)
        except (psutil.Error, OSError):
            continue
        if ours and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def prefect_servers(project: SmallProject) -> list[int]:
    words = {"flows.services.prefect_server", str(project.home)}
    return [one.pid for one in of_the_home(project) if words <= set(one.cmdline())]


def wait_for(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def start_long(up: Up) -> str:
    """Start a run; returns once its RL step computes and has saved its state."""
    run = up.start(params=LONG, overrides=["checkpoints.every_steps=5"])
    up.wait(run, "RUNNING")
    wait_for(lambda: any((up.project.home / "locks").glob("rl-*.lock")) and saved(up))
    return run


def saved(up: Up) -> bool:
    """Whether the RL step has a checkpoint."""
    return any((up.project.home / "checkpoints").glob("rl-*/[!.]*"))


def status_of(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    assert caught.value.code in (409, 422)
    return caught.value.read().decode()


def approved_promotion(up: Up) -> dict[str, Any]:
    """A run of the deployment `promote` that was paused, and was told to go on."""
    deployment = up.ask("deployments/name/promote/promote")
    path = f"deployments/{deployment['id']}/create_flow_run"
    assert "maximum of 1" in refused(lambda: up.ask(path, {"parameters": {"threshold": 1}}))
    run = up.ask(path, {"parameters": {"threshold": 0}})["id"]
    up.wait(run, "PAUSED")
    assert [one["state"] for one in up.cli("status")["runs"]] == ["Paused"]
    answer = {"run_input": {"promote": True, "by": "Ann"}}
    # The form is there a moment after the state.
    wait_for(lambda: up.ask(f"flow_runs/{run}/resume", answer)["status"] == "ACCEPT")
    return up.wait(run, "COMPLETED")


def query(up: Up, sql: str) -> list[Any]:
    database = up.project.home / "prefect" / "prefect.db"
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(sql).fetchall()


def look(up: Up, *states: str, **parameters: Any) -> dict[str, Any]:
    """A run of `data-watch`, once it has ended in one of the states."""
    return up.wait(up.start("data-watch/data-watch", **parameters), *states)


def started_by_itself(up: Up, count: int, seconds: float = 30) -> dict[str, Any]:
    """The last of so many runs that the automation has started, as soon as it is under way."""
    deadline = time.monotonic() + seconds
    while True:
        runs = up.ask("flow_runs/filter", {"flows": {"name": {"any_": ["align"]}}})
        made = [run for run in runs if (run["created_by"] or {}).get("type") == "AUTOMATION"]
        made.sort(key=lambda run: str(run["created"]))
        assert len(made) <= count
        if len(made) == count and made[-1]["state_type"] != "SCHEDULED":
            return dict(made[-1])
        assert time.monotonic() < deadline, [run["state"] for run in made]
        time.sleep(0.3)


def events(up: Up) -> list[dict[str, Any]]:
    """The events of changed data, newest first; they reach the database in batches."""
    found: list[dict[str, Any]] = up.ask(
        "events/filter", {"filter": {"event": {"name": ["dvc.data.changed"]}}}
    )["events"]
    return found


def change_a_prompt(project: SmallProject, word: str) -> None:
    """Change a prompt that RL samples from to another one, and have DVC pin it."""
    rows = project.rows("prompts")
    row = next(row for row in rows if in_train(row["prompt"]))
    texts = (f"{row['prompt']} {word} {number}" for number in range(100))
    row["prompt"] = next(text for text in texts if in_train(text))
    project.write_rows("prompts", rows)
    project.dvc("add", "data")


def in_train(prompt: str) -> bool:
    return split_of(prompt_id(json.dumps([{"role": "user", "content": prompt}])), 0.2) == "train"


def only_what_depends_on_prompts(steps: dict[str, str]) -> bool:
    """Whether RL ran, and nothing before it but the preparation of the data."""
    # A policy that comes out the same to the bit, since RL has not drawn the row, ends it there.
    rest = {steps.pop("evaluate"), steps.pop("register")}
    return rest <= {"Completed", "Cached"} and steps == {
        "prepare_data": "Completed", "base_model": "Cached", "sft": "Cached",
        "reward_model": "Cached", "rl": "Completed",
    }  # fmt: skip


def changed_data_starts_runs(up: Up, folder: Path) -> None:
    """Change the data here, badly, and in another clone, and see what `data-watch` makes of it."""
    assert look(up, "COMPLETED")["state_name"] == "Unchanged"

    # A changed row is announced, and a run starts by itself: only of what depends on it.
    change_a_prompt(up.project, "again")
    found = look(up, "COMPLETED")
    assert found["state_name"] == "Announced", found["state"]
    run = started_by_itself(up, 1)
    assert look(up, "COMPLETED")["state_name"] == "Announced before"
    up.wait(run["id"], "COMPLETED")
    assert only_what_depends_on_prompts(up.steps(run["id"]))
    assert run["parameters"]["data_rev"] == read_pin(up.project.root)
    assert look(up, "COMPLETED")["state_name"] == "Unchanged"

    # An invalid row starts nothing, and the pages say which it is.
    up.project.write_rows("prompts", [*up.project.rows("prompts"), {"prompt": " "}])
    up.project.dvc("add", "data")
    invalid = look(up, "FAILED")
    assert invalid["state_name"] == "Invalid data"
    assert "prompts.jsonl:121 prompt: " in invalid["state"]["message"]
    (page,) = up.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [invalid["id"]]}}})
    assert "| prompts.jsonl | 121 | prompt | " in page["data"]

    # A commit that somebody else has pushed is announced, whatever is in the work tree here.
    push_from_elsewhere(up.project, folder)
    pinned = read_pin(up.project.root)
    by_hand = up.cli("data", "watch", "--experiment", "tiny", "--ref", "origin/main")
    assert by_hand["state"] == "announced"
    run = started_by_itself(up, 2)
    assert run["parameters"]["data_rev"] == by_hand["rev"] != pinned
    up.wait(run["id"], "COMPLETED")
    assert only_what_depends_on_prompts(up.steps(run["id"]))
    assert read_pin(up.project.root) == pinned
    assert up.project.rows("prompts")[-1] == {"prompt": " "}

    up.project.git("checkout", "--quiet", "data.dvc")
    up.project.dvc("checkout", "--force", "data.dvc")

    wait_for(lambda: len(events(up)) == 2, seconds=20)
    last, first = events(up)
    assert [change["path"] for change in first["payload"]["files"]] == ["prompts.jsonl"]
    assert (first["payload"]["source"], last["payload"]["source"]) == ("work tree", "origin/main")


def push_from_elsewhere(project: SmallProject, folder: Path) -> None:
    """Change a prompt in a clone, and push it to a remote that the project has, too."""
    bare, clone = folder / "bare.git", folder / "clone"
    project.git("clone", "--quiet", "--bare", ".", str(bare))
    project.git("remote", "add", "origin", str(bare))
    project.git("clone", "--quiet", str(bare), str(clone))
    theirs = type(project)(clone, project.home)
    theirs.dvc("pull")
    change_a_prompt(theirs, "elsewhere")
    theirs.dvc("push")
    theirs.git("add", "data.dvc", ".dvc-store")
    theirs.git("commit", "--quiet", "-m", "Other data")
    theirs.git("push", "--quiet", "origin", "main")


@pytest.mark.timeout(1200)
def test_from_up_to_down(up, tmp_path):
    # A run of the command line is under way, on a server of its own.
    file = up.project.root / "early.json"
    early = up.project.start("run", "tiny", "--json", str(file))
    wait_for(lambda: any((up.project.home / "locks").glob("*.lock")))
    said = up.cli("up", *up.options, "--name", "proxy.example")

    # Everything is there, and says so.
    assert said["up"]
    assert {name: one["state"] for name, one in said["services"].items()} == {
        "prefect": "up", "mlflow": "up", "worker-local": "up",
    }  # fmt: skip
    assert said["services"]["prefect"]["url"] == up.prefect
    assert said["services"]["mlflow"]["url"] == up.mlflow
    deployment, watch = said["deployments"]
    assert (deployment["name"], deployment["pool"]) == ("align/tiny", "local")
    assert (watch["name"], watch["pool"]) == ("data-watch/data-watch", "local")
    assert [s["active"] for s in deployment["schedules"]] == [False]
    assert up.cli("status")["services"] == said["services"]
    assert {pool["name"] for pool in up.ask("work_pools/filter", {})} == {"local", "gpu"}
    assert up.ask("v2/concurrency_limits/gpu")["limit"] == 1

    # Foreign names and pages are refused.
    for url in (
        f"{up.prefect}/api/admin/version",
        f"{up.mlflow}/api/2.0/mlflow/experiments/search",
    ):
        assert status_of(url, Host="evil.example") == 403
    assert status_of(f"{up.prefect}/api/health", Origin="http://evil.example") == 403
    for place in (f"{up.prefect}/", f"{up.mlflow}/"):
        assert status_of(place) == 200
        # By the name that was given, and through a port that was forwarded.
        assert status_of(place, Host="proxy.example") == 200
        assert status_of(place, Host="localhost:5050") == 200

    # Bad values are refused at submit; what only the loader sees, in the first second of the run.
    assert "kl_coef" in refused(lambda: up.start(params={"rl": {"kl_coef": -1}}))
    assert "Additional properties" in refused(lambda: up.start(params={"rl": {"klcoef": 1}}))
    assert "not one of" in refused(lambda: up.start(experiment="tinny"))
    assert refused(lambda: up.start(overrides=["rl.kl_coef"]))
    assert refused(lambda: up.start(refresh=["evaluat"]))
    bad = up.wait(up.start(overrides=["rl.klcoef=1"]), "FAILED")
    assert (
        "--set rl.klcoef=1: rl.klcoef: unknown key; did you mean rl.kl_coef?"
        in (bad["state"]["message"])
    )
    assert bad["total_run_time"] < 5

    # The run from before is over, where it was started, and is there to see.
    assert early.wait(180) == 0, early.communicate()
    early.communicate()
    earlier = json.loads(file.read_bytes())["prefect_flow_run_id"]
    assert up.ask(f"flow_runs/{earlier}")["state_type"] == "COMPLETED"
    wait_for(lambda: len(prefect_servers(up.project)) == 1)

    # A run of the deployment does every step, and the same again takes all from the cache.
    first = up.start(params={"seed": 1})
    found = up.wait(first, "COMPLETED")
    assert found["name"] == "tiny-seed1"
    # No seed is in it.
    assert up.steps(first) == dict.fromkeys(STEPS, "Completed") | {"prepare_data": "Cached"}
    again = up.start(params={"seed": 1})
    up.wait(again, "COMPLETED")
    assert up.steps(again) == dict.fromkeys(STEPS, "Cached")

    # The command line's runs join the server, and take what the worker's runs made.
    result = up.project.result("run", "--record", "--set", "seed=1")
    assert {step["status"] for step in result["steps"].values()} == {"cached"}
    assert up.ask(f"flow_runs/{result['prefect_flow_run_id']}")["state_type"] == "COMPLETED"
    assert prefect_servers(up.project) == [said["services"]["prefect"]["pid"]]

    # A second `up` deploys what changed, repairs what died, and leaves the rest as it is.
    nightly = up.deployment()["schedules"][0]
    path = f"deployments/{up.deployment()['id']}/schedules/{nightly['id']}"
    up.ask(path, {"active": True}, method="PATCH")
    assert up.deployment("data-watch/data-watch")["global_concurrency_limit"]
    unlimited = WATCH.replace(LIMIT_OF_WATCH, "")
    (up.project.root / "prefect.yaml").write_text(DEPLOYMENTS + unlimited + SECOND + SWEEP)
    (up.project.root / "params" / "two.yaml").write_text(TWO)
    (automation,) = up.ask("automations/filter", {})
    up.ask(f"automations/{automation['id']}", {"enabled": False}, method="PATCH")
    psutil.Process(said["services"]["mlflow"]["pid"]).kill()
    after = up.cli("up")
    assert after["services"]["prefect"] == said["services"]["prefect"]
    assert after["services"]["worker-local"] == said["services"]["worker-local"]
    assert after["services"]["mlflow"]["url"] == up.mlflow
    assert status_of(f"{up.mlflow}/", Host="proxy.example") == 200
    assert after["services"]["mlflow"]["pid"] != said["services"]["mlflow"]["pid"]
    names = [
        "align/second", "align/tiny", "data-watch/data-watch", "promote/promote", "sweep/sweep",
    ]  # fmt: skip
    assert [one["name"] for one in after["deployments"]] == names
    assert after["deployments"][1]["schedules"][0]["active"]
    assert up.deployment("data-watch/data-watch")["global_concurrency_limit"] is None
    up.ask(path, {"active": False}, method="PATCH")
    assert [one["enabled"] for one in up.ask("automations/filter", {})] == [False]
    up.ask(f"automations/{automation['id']}", {"enabled": True}, method="PATCH")

    changed_data_starts_runs(up, tmp_path)

    # A promotion waits on its page for a person, whose word comes through the API.
    assert approved_promotion(up)["state_name"] == "Promoted"

    # A run that is cancelled in the UI saves its state, before Prefect would kill it.
    cancelled = start_long(up)
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": True}
    up.ask(f"flow_runs/{cancelled}/set_state", state)
    # Where Prefect's word of a cancellation comes after the signal, it counts as a crash.
    up.wait(cancelled, "CANCELLED", "CRASHED", seconds=60)
    wait_for(lambda: up.steps(cancelled)["rl"] == "Crashed")
    assert saved(up)

    # A sweep through the worker: a point that fails stops no other, and each is linked.
    (up.project.root / "faulty.py").write_text(FAULTY)
    assert "not one of" in refused(lambda: up.start("sweep/sweep", sweep="tiny"))
    assert "maximum" in refused(lambda: up.start("sweep/sweep", parallel=65))
    swept = up.start("sweep/sweep", parallel=2, overrides=["seed=1"])
    ended = up.wait(swept, "FAILED")
    assert "1 of 2 points failed: 2 (rewards=" in ended["state"]["message"]
    assert ended["name"] == "two-seed1-parallel2"
    page = up.artifacts(swept)
    assert {key: one["type"] for key, one in page.items()} == {
        "mlflow": "markdown", "sweep-progress": "progress", "frontier": "image",
        "sweep": "markdown",
    }  # fmt: skip
    assert float(page["sweep-progress"]["data"]) == 100
    summary = page["sweep"]["data"]
    name = page["mlflow"]["data"].partition("]")[0].lstrip("[").replace("\\_", "_")
    made = up.points(name)
    assert {tag: one["state_type"] for tag, one in made.items()} == {
        "point:1": "COMPLETED", "point:2": "FAILED",
    }  # fmt: skip
    for one in made.values():
        assert f"(/runs/flow-run/{one['id']})" in summary
    assert summary.count(f"({up.mlflow}/#/experiments/") == 3
    assert f"({up.mlflow}/#/models/plumbline-policy/versions/" in summary
    assert "data:image/png;base64," in summary

    # One that is cancelled ends its points, which save their state.
    for folder in (up.project.home / "checkpoints").glob("rl-*"):
        shutil.rmtree(folder)
    points = "sweep.points=[{rl.kl_coef: 0.07}]"
    more = ["rl.episodes=4800", "checkpoints.every_steps=5"]
    stopped = up.start("sweep/sweep", overrides=[points, *more])
    wait_for(lambda: saved(up))
    up.ask(f"flow_runs/{stopped}/set_state", state)
    up.wait(stopped, "CANCELLED", "CRASHED", seconds=60)
    wait_for(
        lambda: (
            not [one for one in of_the_home(up.project) if "flows.sweeps.starter" in one.cmdline()]
        )
    )
    assert saved(up)

    # `down` ends all; a run in progress saves its state and is marked.
    long = up.start("sweep/sweep", overrides=[points, *more])
    before = [*(up.project.home / "checkpoints").glob("rl-*/[!.]*")]
    up.wait(long, "RUNNING")
    wait_for(lambda: [*(up.project.home / "checkpoints").glob("rl-*/[!.]*")] != before)
    under_way = {run["id"] for run in up.cli("status")["runs"]}
    assert long in under_way
    assert len(under_way) == 2
    began = time.monotonic()
    ended = up.cli("down")
    assert time.monotonic() - began < 60
    assert ended == {
        "services": ["mlflow", "prefect", "worker-local"], "runs": [long], "killed": [],
    }  # fmt: skip
    assert saved(up)
    assert query(up, f"select state_type from flow_run where id = '{long}'") == [("CRASHED",)]
    assert of_the_home(up.project) == []
    assert up.cli("down") == {"services": [], "runs": [], "killed": []}
    assert not up.cli("status", code=1)["up"]

    # Nothing of the environment was written down anywhere.
    secrets = {SECRET, *(v for v in up.project.environment().values() if v.startswith("planted"))}
    assert len(secrets) > 1
    for file in up.project.home.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], file
    assert os.environ.get("PLUMBLINE_TEST_SECRET") is None
