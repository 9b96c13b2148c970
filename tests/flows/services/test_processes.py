"""Tests of flows.services.processes and .up: records, ports and processes, without any server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

from flows.services import processes, status, up
from flows.services.deployment_file import read_deployments
from flows.services.hosts import in_url, names_of
from flows.services.processes import MLFLOW, PREFECT, Address, Service, State
from flows.services.up import Wanted
from plumbline.errors import MachineError, ParamsError
from plumbline.params.loader import list_experiments

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('deaf', flush=True); time.sleep(600)",
]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)",
]

Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts services whose home is the test's folder; none of them outlives the test."""

    def launch(name: str, command: list[str], **more: object) -> Service:
        return processes.launch(tmp_path, name, command, cwd=tmp_path, env={}, **more)

    yield launch
    for process in processes.members(tmp_path):
        process.kill()


@pytest.fixture
def busy() -> Iterator[int]:
    """A port at which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_port_in_use_is_named_with_its_owner(busy):
    with pytest.raises(MachineError) as caught:
        processes.check_free(Address("127.0.0.1", busy), "--prefect-port")

    message = str(caught.value)
    assert message.startswith(f"--prefect-port {busy}: expected a free port")
    assert f"process {os.getpid()} (" in message
    assert "python" in message


def test_a_free_port_is_free_again_after_the_look():
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    address = Address("127.0.0.1", port)

    processes.check_free(address, "--mlflow-port")
    processes.listen(address, "--mlflow-port").close()


def test_a_host_of_another_machine_is_refused():
    with pytest.raises(MachineError, match=r"Can't listen at 203\.0\.113\.1.*--host"):
        processes.check_free(Address("203.0.113.1", 4200), "--prefect-port")


def test_the_record_is_read_back(tmp_path, start):
    service = start(PREFECT, SLEEP, address=Address("0.0.0.0", 4200))
    state = State(
        services={PREFECT: service}, deployed="abc", deployments={"align/quickstart": ["nightly"]}
    )

    processes.write_state(tmp_path, state)

    assert processes.read_state(tmp_path) == state
    assert service.alive
    assert service.address is not None
    assert service.address.url == "http://127.0.0.1:4200"
    assert not list(tmp_path.glob(".services*"))


@pytest.mark.parametrize("text", ["", "{", '{"services": {"prefect": 1}}'])
def test_a_record_that_is_damaged_counts_as_none(tmp_path, text):
    (tmp_path / "services.json").write_text(text)

    assert processes.read_state(tmp_path) == State()


def test_one_at_a_time(tmp_path):
    with (
        processes.alone(tmp_path),
        pytest.raises(MachineError, match="Another"),
        processes.alone(tmp_path),
    ):
        pass
    with processes.alone(tmp_path):
        pass


def test_a_service_is_found_with_what_it_has_started_even_after_its_death(tmp_path, start):
    service = start("mlflow", PARENT)
    other = start("prefect", SLEEP)
    wait_until(lambda: len(processes.members(tmp_path, "mlflow")) == 2)

    os.kill(service.pid, signal.SIGKILL)
    wait_until(lambda: not service.alive)

    (left,) = processes.members(tmp_path, "mlflow")
    assert left.pid != service.pid
    assert processes.service_names(tmp_path) == ["mlflow", "prefect"]
    assert processes.end([left], 10) == []
    assert processes.members(tmp_path, "mlflow") == []
    assert other.alive
    assert processes.members(tmp_path.parent) == []


def test_what_is_deaf_to_sigterm_is_killed(tmp_path, start):
    service = start("worker-local", DEAF)
    wait_until(lambda: "deaf" in Path(service.log).read_text())
    left = processes.members(tmp_path)

    assert [one.pid for one in processes.end(left, 0.3)] == [service.pid]
    assert processes.members(tmp_path) == []
    assert not service.alive


def test_a_log_is_new_and_the_last_one_is_kept(tmp_path, start):
    for word in ("first", "second"):
        service = start("prefect", [sys.executable, "-c", f"print('{word}')"])
        wait_until(lambda s=service: not s.alive)

    assert Path(service.log).read_text() == "second\n"
    assert Path(service.log).with_suffix(".log.1").read_text() == "first\n"
    assert "second" in processes.log_tail(service)


def test_a_server_that_ends_as_it_starts_is_an_error_with_its_log(start):
    service = start("prefect", [sys.executable, "-c", "raise SystemExit('no room')"])

    with pytest.raises(MachineError, match=r"(?s)prefect ended as it started\..*no room"):
        processes.wait_until_answers("prefect", service, "http://127.0.0.1:9/", 20)


# What is to be started.


def record(start: Start, port: int, name: str = PREFECT) -> State:
    return State(services={name: start(name, SLEEP, address=Address("127.0.0.1", port))})


def test_without_a_record_the_defaults_are_used():
    address = up._address(State(), MLFLOW, Wanted())

    assert address == Address("127.0.0.1", 5000)


def test_what_runs_already_is_not_started(start):
    state = record(start, 4321)

    assert up._address(state, PREFECT, Wanted()) is None
    assert up._address(state, PREFECT, Wanted(ports={PREFECT: 4321})) is None


def test_what_runs_elsewhere_than_it_should_is_not_moved(start):
    state = record(start, 4321)

    for wanted in (Wanted(ports={PREFECT: 4200}), Wanted(host="0.0.0.0")):
        with pytest.raises(MachineError, match=r"runs at 127\.0\.0\.1:4321.*plumbline down"):
            up._address(state, PREFECT, wanted)


def test_what_runs_under_other_names_is_not_renamed(start):
    address = Address("127.0.0.1", 4321)
    state = State(services={PREFECT: start(PREFECT, SLEEP, address=address, names=["a.example"])})

    assert up._address(state, PREFECT, Wanted(names=("a.example",))) is None
    assert up._address(state, PREFECT, Wanted()) is None
    with pytest.raises(MachineError, match=r"the names a\.example, expected b\.example.*down"):
        up._address(state, PREFECT, Wanted(names=("b.example",)))


def test_mlflow_takes_its_names_at_any_port_and_no_others():
    names = [in_url(name) for name in names_of("127.0.0.1", ["proxy.example"])]
    patterns = [*names, *map(up._at_any_port, names)]

    # A port that ssh forwards has a number of its own.
    for host in ("localhost:5050", "127.0.0.1:80", "[::1]:5000", "proxy.example", "localhost"):
        assert is_allowed_host_header(patterns, host)
    for host in ("evil.example:5000", "localhost.evil.example:5000", "[::2]:5000", ""):
        assert not is_allowed_host_header(patterns, host)
    origins = up._origins(names)
    assert not should_block_cors_request("https://proxy.example", "POST", origins)
    assert should_block_cors_request("http://evil.example:5000", "POST", origins)


def test_what_died_is_started_where_it_was(start):
    state = record(start, 4321)
    os.kill(state.services[PREFECT].pid, signal.SIGKILL)
    wait_until(lambda: not state.services[PREFECT].alive)

    assert up._address(state, PREFECT, Wanted()) == Address("127.0.0.1", 4321)
    moved = up._address(state, PREFECT, Wanted("::1", {PREFECT: 4322}))
    assert moved == Address("::1", 4322)


def renamed(service: Service) -> Service:
    """As it was recorded before the host had its name, or the container was made anew."""
    return service.model_copy(update={"process": f"other{service.process}"})


def test_after_the_host_was_renamed_what_is_here_lives(start):
    for name, address in ((PREFECT, Address("127.0.0.1", 9)), ("worker-local", None)):
        service = renamed(start(name, SLEEP, address=address))
        wait_until(lambda s=service: s.alive)

        os.kill(service.pid, signal.SIGKILL)
        wait_until(lambda s=service: not s.alive)


def test_in_a_container_that_was_made_anew_what_is_gone_has_died(tmp_path, monkeypatch):
    log = str(tmp_path / "services" / "mlflow.log")
    gone = Service(process="other/boot/1/1.0", since="", log=log, address=Address("127.0.0.1", 9))
    worker = gone.model_copy(update={"address": None, "log": log.replace("mlflow", "worker-gpu")})

    assert not gone.alive
    assert not worker.alive
    assert status._word(gone, MLFLOW) == status._word(worker, "worker-gpu") == "died"
    assert up._address(State(services={MLFLOW: gone}), MLFLOW, Wanted()) == gone.address
    # On another machine that this one reaches, it answers.
    monkeypatch.setattr(processes, "answers", lambda url: url == "http://127.0.0.1:9/health")
    assert gone.alive


def test_what_is_left_of_the_dead_is_ended_and_the_living_stay(tmp_path, start):
    dead = start("mlflow", PARENT)
    wait_until(lambda: len(processes.members(tmp_path, "mlflow")) == 2)
    os.kill(dead.pid, signal.SIGKILL)
    wait_until(lambda: not dead.alive)
    living, forgotten = start("prefect", SLEEP), start("worker-local", SLEEP)
    # A process has no environment for an instant while it becomes another program.
    wait_until(lambda: {"prefect", "worker-local"} <= set(processes.service_names(tmp_path)))

    up._end_remains(tmp_path, State(services={"mlflow": dead, "prefect": living}))

    assert processes.service_names(tmp_path) == ["prefect"]
    assert living.alive
    assert not forgotten.alive


def test_both_at_one_port_is_refused():
    both = {PREFECT: Address("127.0.0.1", 4200), MLFLOW: Address("127.0.0.1", 4200)}

    with pytest.raises(MachineError, match="different ports"):
        up._check_ports(both)


def test_what_a_host_makes_reachable_is_named():
    for name, words in ((PREFECT, "run any command as"), (MLFLOW, "delete runs, models")):
        said = up.exposure(name, Address("0.0.0.0", 4200))
        assert "0.0.0.0, port 4200, with no password" in said
        assert words in said


# prefect.yaml.


def test_the_shipped_file_has_a_deployment_for_each_experiment():
    root = Path(__file__).resolve().parents[3]
    experiments = {item.name for item in list_experiments(root / "params")}

    assert set(read_deployments(root)) >= experiments


def test_what_waits_for_a_person_has_no_run_limit():
    root = Path(__file__).resolve().parents[3]
    stanzas = yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]
    paused = [one for one in stanzas if one["entrypoint"].startswith("flows.deployments.promote.")]

    assert paused
    # A pause gives the slot back, and the engine ends a run that can't renew it.
    assert not [one["name"] for one in paused if "concurrency_limit" in one]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is gone"),
        ("deployments: [", "broken YAML"),
        ("name: x", "a list `deployments`"),
        ("deployments: [a]", "a list `deployments`"),
        ("deployments: [{tags: []}]", "`name`"),
        ("deployments: [{name: a}, {name: a}]", "got a twice"),
        ('deployments: [{name: a, schedules: [{cron: "0 2 * * *"}]}]', "a: .* a `slug`"),
    ],
)
def test_a_file_that_can_not_be_deployed_is_refused_before_anything_starts(tmp_path, text, message):
    if text is not None:
        (tmp_path / "prefect.yaml").write_text(text)

    with pytest.raises(ParamsError, match=message):
        read_deployments(tmp_path)


def test_a_port_for_a_server_that_is_named_is_refused(project):
    (project.root / "prefect.yaml").write_text("deployments: [{name: a}]\n")

    done = project.cli("up", "--prefect-port", "4300", PREFECT_API_URL="http://127.0.0.1:9/api")

    assert done.returncode == 2
    assert "PREFECT_API_URL names a server" in done.stderr


def test_a_busy_port_stops_up_before_anything_starts(project, busy):
    (project.root / "prefect.yaml").write_text("deployments: [{name: a}]\n")
    with socket.create_server(("127.0.0.1", 0)) as found:
        free = found.getsockname()[1]

    done = project.cli("up", "--prefect-port", str(free), "--mlflow-port", str(busy))

    assert done.returncode == 2
    assert f"--mlflow-port {busy}: expected a free port" in done.stderr
    assert f"process {os.getpid()} (" in done.stderr
    assert "starting" not in done.stderr
    assert not (project.home / "services").exists()
    assert processes.members(project.home) == []


def test_down_and_status_of_nothing(project):
    assert project.cli("down").returncode == 0
    looked = project.cli("status")

    assert looked.returncode == 1
    assert "prefect" in looked.stdout
    assert "down" in looked.stdout


def test_down_is_refused_while_a_run_of_the_command_line_uses_the_server(project, start):
    holder = (
        "import sys; from pathlib import Path; from flows.services import prefect_server as p\n"
        "folder = p._folder(Path(sys.argv[1]))\n"
        "held = p._locked(folder / p.USERS[p.LASTING], p.fcntl.LOCK_SH)\n"
        "print('held', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(project.home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        done = project.cli("down")
        process.communicate("\n", timeout=20)

    assert done.returncode == 2
    assert f"process {process.pid}" in done.stderr
    assert project.cli("down").returncode == 0
