"""The services of a project, and their APIs."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.services.processes import members

if TYPE_CHECKING:
    from tests.conftest import SmallProject

UNDER_WAY = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING")


class Up:
    """A project whose services are up, and their APIs."""

    def __init__(self, project: SmallProject, ports: tuple[int, int], env: dict[str, str]) -> None:
        self.project = project
        self.env = env
        self.options = ("--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1]))
        self.prefect, self.mlflow = (f"http://127.0.0.1:{port}" for port in ports)

    def cli(self, command: str, *arguments: str, code: int = 0) -> dict[str, Any]:
        """What `plumbline COMMAND --json` writes; checks its exit code."""
        file = self.project.root / "said.json"
        done = self.project.cli(command, *arguments, "--json", str(file), **self.env)
        assert done.returncode == code, done.stdout + done.stderr
        value: dict[str, Any] = json.loads(file.read_bytes())
        file.unlink()
        return value

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """Call Prefect's API; 503 means that its database was locked just then."""
        request = urllib.request.Request(
            f"{self.prefect}/api/{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        for attempt in range(10):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 9:
                    raise
                time.sleep(0.5)

    def deployment(self, name: str = "align/tiny") -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"deployments/name/{name}")
        return found

    def start(self, name: str = "align/tiny", **parameters: Any) -> str:
        """Start a run of a deployment, as its form does; returns its id."""
        path = f"deployments/{self.deployment(name)['id']}/create_flow_run"
        return str(self.ask(path, {"parameters": parameters})["id"])

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """What the page of a run shows, by key."""
        found = self.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {one["key"]: one for one in found if one["key"]}

    def points(self, sweep: str) -> dict[str, dict[str, Any]]:
        """The flow runs of a sweep's points, by their tags."""
        wanted = {"tags": {"all_": [f"sweep:{sweep}"]}}
        found = self.ask("flow_runs/filter", {"flow_runs": wanted})
        return {tag: one for one in found for tag in one["tags"] if tag.startswith("point:")}

    def wait(self, run: str, *states: str, seconds: float = 180) -> dict[str, Any]:
        """Wait until a run is in one of the states."""
        deadline = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.ask(f"flow_runs/{run}")
            if found["state_type"] in states:
                return found
            assert found["state_type"] in UNDER_WAY, found["state"]
            assert time.monotonic() < deadline, found["state"]
            time.sleep(0.3)

    def steps(self, run: str) -> dict[str, str]:
        """The state of each step of a run."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        tasks = self.ask("task_runs/filter", body)
        return {task["name"].rpartition("-")[0]: task["state_name"] for task in tasks}


def free_ports() -> tuple[int, int]:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        return one.getsockname()[1], two.getsockname()[1]


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[Up]]:
    """Gives a project ports for its `up`; ends afterwards what that started."""

    @contextmanager
    def serve(project: SmallProject, **env: str) -> Iterator[Up]:
        try:
            yield Up(project, free_ports(), env)
        finally:
            project.cli("down")
            for process in members(project.home):
                process.kill()

    return serve


@pytest.fixture(scope="session")
def processes_in() -> Callable[[Path], list[str]]:
    """Names the processes whose working directory is below a folder."""

    def processes_in(folder: Path) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (path / "cwd").resolve().is_relative_to(folder):
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    return processes_in


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """Waits until a condition holds, at most so many seconds."""

    def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.1)

    return wait_for
