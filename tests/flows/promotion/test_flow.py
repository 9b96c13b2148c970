"""A challenger of a real run meets the champion, with a person's word or without; and is served."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest
from mlflow import MlflowClient

from flows.models.serving import otherwise

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import SmallProject

MODEL = "plumbline-policy"
# The gold scorer gives models as young as these nothing but zeros.
WITHOUT_GOLD = ("--set", "evaluate.gold=null")
DRIVER = """\
import json, sys
from flows.environment import prepare_environment
from plumbline.project import find_project
prepare_environment(find_project())
from flows.deployments.promote import promote
for arguments in json.loads(sys.argv[1]):
    state = promote(**arguments, return_state=True)
    print(json.dumps([state.type.value, state.name, state.message]), flush=True)
"""
"""Runs the deployment's flow as a worker would, once for each of the arguments."""


class Rivals(NamedTuple):
    """A project with two versions of its model, the first of which was made the champion."""

    project: SmallProject
    store: MlflowClient
    second: dict[str, Any]
    """What `run --json` wrote of the version that challenges."""


def promote(project: SmallProject, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `plumbline promote --json` writes; checks its exit code."""
    file = project.root / "promotion.json"
    done = project.cli("promote", *arguments, "--json", str(file))
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_bytes())
    assert found["reason"] in done.stdout
    return found


def champion(store: MlflowClient) -> int:
    return int(store.get_model_version_by_alias(MODEL, "champion").version)


@pytest.fixture(scope="module")
def rivals(make_project: Callable[..., SmallProject], prefect_api: str) -> Rivals:
    project = make_project(prefect_api=prefect_api)
    first = project.result("run", *WITHOUT_GOLD)
    store = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
    found = promote(project, "--threshold", "0")

    # Nobody is there to meet, so the run's own comparison with its SFT model decides.
    assert (found["outcome"], found["champion"], found["scorer"]) == (
        "promoted", None, "reward model",
    )  # fmt: skip
    assert found["win_rate"]["low"] == first["metrics"]["eval/win_rate_low"]
    assert found["prompts"] == 16
    assert champion(store) == 1
    second = project.result("run", *WITHOUT_GOLD, "--set", "rl.learning_rate=0.01")
    return Rivals(project, store, second)


@pytest.mark.timeout(600)
def test_a_challenger_meets_the_champion(rivals: Rivals) -> None:
    project, store, second = rivals
    refused = promote(project, "--threshold", "0.99", code=1)
    assert (refused["outcome"], refused["challenger"], refused["champion"]) == ("refused", "2", "1")
    assert champion(store) == 1

    # It answered as in the evaluation of its own run: same prompts, same seed, same scorer.
    met = refused["metrics"]
    assert met["contest/challenger/score"] == second["metrics"]["eval/policy/score"]
    assert met["contest/challenger/score"] != met["contest/champion/score"]
    assert met["contest/prompts"] == second["metrics"]["eval/prompts"] == 16
    assert met["contest/win_rate"] == refused["win_rate"]["mean"]
    assert len(refused["samples"]) == 16

    # The numbers are on the version, and on the run.
    tags = store.get_model_version(MODEL, "2").tags
    assert tags["promotion.outcome"] == "refused"
    assert tags["promotion.against"] == "version 1"
    assert tags["promotion.win_rate"].startswith(f"{met['contest/win_rate']:.3f} [")
    assert tags["promotion.by"]
    assert tags["promotion.at"]
    run = store.get_run(refused["mlflow_run_id"])
    assert (run.data.tags["plumbline.kind"], run.info.status) == ("promotion", "FINISHED")
    assert run.data.metrics["contest/win_rate"] == met["contest/win_rate"]
    assert [below(rivals, refused)["cache.hit"]] == ["false"]

    # The deployment's flow: the same contest is not held twice, and nobody's answer is a no.
    late, by_threshold = flow_runs(
        project,
        {"threshold": 0, "approval_hours": 1 / 3600},
        {"threshold": 0.99, "require_approval": False},
    )
    assert late[:2] == ["COMPLETED", "Refused"]
    assert late[2].endswith("But nobody answered within 1 s.")
    assert by_threshold == ["COMPLETED", "Refused", refused["reason"]]
    assert below(rivals, promotion(rivals))["cache.hit"] == "true"
    assert store.get_model_version(MODEL, "2").tags["promotion.by"] != "nobody"

    # A person's word, given through the API.
    (approved,) = approved_flow_run(rivals, {"threshold": 0})
    assert approved[:2] == ["COMPLETED", "Promoted"]
    assert approved[2].endswith("Approved by Ann (looks good).")
    assert champion(store) == 2
    assert json.loads((project.home / "aliases.json").read_bytes())[f"{MODEL}@champion"] == "2"
    assert store.get_model_version(MODEL, "2").tags["promotion.by"] == "Ann"

    # Who has the place already has nothing to do.
    again = promote(project)
    assert (again["outcome"], again["mlflow_run_id"]) == ("nothing to do", None)


def promotion(rivals: Rivals) -> dict[str, Any]:
    """The newest promotion's run."""
    (newest,) = rivals.store.search_runs(
        [one.experiment_id for one in rivals.store.search_experiments()],
        "tags.`plumbline.kind` = 'promotion'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return {"mlflow_run_id": newest.info.run_id}


def below(rivals: Rivals, found: dict[str, Any]) -> dict[str, str]:
    """The tags of the contest below a promotion's run."""
    (contest,) = rivals.store.search_runs(
        [one.experiment_id for one in rivals.store.search_experiments()],
        f"tags.`mlflow.parentRunId` = '{found['mlflow_run_id']}'",
    )
    assert contest.data.tags["plumbline.step"] == "contest"
    return dict(contest.data.tags)


def flow_runs(project: SmallProject, *arguments: dict[str, Any]) -> list[list[str]]:
    """The states in which runs of the deployment's flow end: type, name, message."""
    process = start_flow_runs(project, *arguments)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")]


def start_flow_runs(project: SmallProject, *arguments: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(arguments)],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def approved_flow_run(rivals: Rivals, arguments: dict[str, Any]) -> list[list[str]]:
    """A run of the flow that waits, and goes on once its form is sent."""
    project = rivals.project
    process = start_flow_runs(project, arguments)
    try:
        wanted = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        (waits,) = wait_for(lambda: ask(project, "flow_runs/filter", wanted), process)
        resume = f"flow_runs/{waits['id']}/resume"

        # The form is there a moment after the state; what it does not take is refused.
        def send(**answer: Any) -> dict[str, Any]:
            said: dict[str, Any] = ask(project, resume, {"run_input": answer})
            return said

        wait_for(lambda: "not found" not in send()["details"].get("reason", ""), process)
        assert send(promote=True)["status"] == "REJECT"
        assert send(promote=True, by="")["status"] == "REJECT"
        assert send(promote=True, by="Ann", note="looks good")["status"] == "ACCEPT"
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    finally:
        process.kill()
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")]


def ask(project: SmallProject, path: str, body: Any) -> Any:
    """Call Prefect's API; 503 means that its database was locked just then."""
    for attempt in range(10):
        try:
            return post(f"{project.prefect_api}/{path}", body)
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempt == 9:
                raise
            time.sleep(0.5)
    raise AssertionError("the attempts have an end")


def post(url: str, body: Any, **headers: str) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def wait_for(look: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What a look finds in the end, while a process lives."""
    deadline = time.monotonic() + 120
    while not (found := look()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def test_who_is_not_there_is_named(rivals: Rivals) -> None:
    done = rivals.project.cli("promote", "nobody")
    assert done.returncode == 2
    assert "No registered model plumbline-policy@nobody" in done.stderr
    assert "`plumbline promote` makes" in otherwise("champion")
    assert "plumbline run quickstart" in otherwise("challenger")
    done = rivals.project.cli("promote", "--ask")
    assert done.returncode == 2
    assert "expected a terminal to ask on" in done.stderr


# Serving.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.timeout(300)
def test_a_model_is_served(rivals: Rivals, number: signal.Signals) -> None:
    project, port = rivals.project, free_port()
    url = f"http://127.0.0.1:{port}"
    server = project.start("serve", "champion", "--port", str(port))
    try:
        if number == signal.SIGINT:
            # As in the tour: at once, while the server starts and its model loads.
            assert talk(project, "--url", url).startswith("model> ")
        wait_for(lambda: answers(f"{url}/ping"), server)
        if number == signal.SIGINT:
            check_answers(url)
            check_refusals(project, url, port)
            check_chat(project, url)
        inside = psutil.Process(server.pid).children(recursive=True)
        assert inside == []
        server.send_signal(number)
        _, err = server.communicate(timeout=20)
        assert server.returncode == 0, err
        assert "ended" in err
        assert "Traceback" not in err
    finally:
        server.kill()
    assert not answers(f"{url}/ping")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def check_answers(url: str) -> None:
    turns = [{"role": "user", "content": "How do I fold a napkin?"}]
    body = {"messages": turns, "max_tokens": 12, "temperature": 0.5, "seed": 7}
    said = post(f"{url}/invocations", body)
    assert said["object"] == "chat.completion"
    assert said["model"].startswith(f"{MODEL}/")
    (choice,) = said["choices"]
    assert choice["message"]["role"] == "assistant"
    assert said["usage"]["completion_tokens"] <= 12
    assert choice["finish_reason"] in ("stop", "length")
    # The end token ends an answer and is not in it.
    assert not re.search(r"<\|\w+\|>", choice["message"]["content"])
    named = {**body, "model": said["model"]}
    assert post(f"{url}/invocations", named)["choices"] == said["choices"]
    assert post(f"{url}/invocations", {**body, "seed": 8})["choices"] != said["choices"]
    texts = post(f"{url}/invocations", {"inputs": ["Where does the river end?", "Why?"]})
    assert [type(text) for text in texts["predictions"]] == [str, str]
    rows = {"dataframe_split": {"columns": ["text"], "data": [["Why?"]]}}
    assert len(post(f"{url}/invocations", rows)["predictions"]) == 1


def check_refusals(project: SmallProject, url: str, port: int) -> None:
    turns = [{"role": "user", "content": "Why?"}]
    for body, words in (
        ({"messages": turns, "top_p": 0.5}, "top_p: Extra inputs are not permitted"),
        ({"messages": turns, "model": "gpt-4"}, f"model: expected {MODEL}/"),
        ({"messages": turns, "model": "gpt-4"}, "which is served, got gpt-4; leave it out"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": turns, "temperature": 0}, "temperature: Input should be greater than 0"),
        ({"messages": [{"role": "user", "content": "a " * 400}]}, "the model's context of 160"),
        ({"prompt": "Why?"}, "neither messages nor texts"),
        ({"inputs": [1]}, "neither messages nor texts"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{url}/invocations", body)
        assert caught.value.code == 400
        said = json.loads(caught.value.read())["message"]
        assert words in said
        assert "Expected" in said
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"{url}/invocations", {"messages": turns}, Host="evil.example")
    assert caught.value.code == 403
    second = project.cli("serve", "--port", str(port))
    assert second.returncode == 2
    assert f"--port {port}: expected a free port, got one that is in use by" in second.stderr
    assert "serve champion" in second.stderr


def check_chat(project: SmallProject, url: str) -> None:
    """What is served answers as what is loaded: the same tokens in, the same stops, the same
    draws."""
    said = [
        talk(project, *where, "--seed", "3", "--max-tokens", "16")
        for where in (("--url", url), (f"{MODEL}@champion",))
    ]
    served, loaded = (text.partition("> ")[2] for text in said)
    assert served == loaded
    assert served.strip()
    done = project.cli("chat", "champion", "--url", url)
    assert done.returncode == 2
    assert "got both: champion and" in done.stderr


def talk(project: SmallProject, *arguments: str) -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("plumbline"), "chat", *arguments],
        cwd=project.root,
        env=project.environment(),
        input="How do I fold a napkin?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
