"""Tests of tasks.spool: what waits for MLflow, on a real disk, with real threads and processes."""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from plumbline.errors import TrainingError
from tasks import spool as spools
from tasks.spool import Outbox, Record, Spool, orphans


class Receiver:
    """Takes records, or fails as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.got: list[Record] = []
        self.calls = 0
        self.texts: list[str] = []

    def __call__(self, spool: Spool, records: Sequence[Record]) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        self.got += records
        self.texts += [(spool.folder / r["file"]).read_text() for r in records if "file" in r]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "PAUSES", (0.02, 0.05))
    monkeypatch.setattr(spools, "SECONDS_BETWEEN_SENDS", 0.05)


def test_records_arrive_once_and_in_order_and_nothing_stays(tmp_path: Path) -> None:
    receiver = Receiver()
    outbox = Outbox(tmp_path / "run", receiver)
    for number in range(300):
        outbox.put({"number": number})
        if number % 50 == 0:
            assert outbox.settle(5)
    assert outbox.close(5)
    assert receiver.got == [{"number": number} for number in range(300)]
    assert not (tmp_path / "run").exists()


def test_what_can_pass_is_waited_for_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver = Receiver(*[ConnectionResetError("lost")] * 5)
    outbox = Outbox(tmp_path / "run", receiver)
    for number in range(30):
        outbox.put({"number": number})
    assert outbox.close(5)
    assert receiver.got == [{"number": number} for number in range(30)]
    assert receiver.calls >= 6
    said = capsys.readouterr().err
    assert said.count("MLflow does not answer (ConnectionResetError: lost)") == 1
    assert said.count("MLflow answers again: 30 records") == 1


def test_who_logs_is_not_held_up_by_a_server_that_hangs(tmp_path: Path) -> None:
    free = threading.Event()
    got: list[Record] = []

    def hang(_: Spool, records: Sequence[Record]) -> None:
        free.wait(10)
        got.extend(records)

    outbox = Outbox(tmp_path / "run", hang)
    started = time.monotonic()
    for number in range(100):
        outbox.put({"number": number})
    assert not outbox.settle(0.1)
    assert time.monotonic() - started < 2
    free.set()
    assert outbox.close(5)
    assert got == [{"number": number} for number in range(100)]


def test_what_is_refused_is_raised_once_and_what_follows_is_sent(tmp_path: Path) -> None:
    receiver = Receiver(ValueError("no such run"))
    outbox = Outbox(tmp_path / "run", receiver)
    outbox.put({"number": 1})
    with pytest.raises(ValueError, match="no such run"):
        outbox.settle(5)
    outbox.put({"number": 2})
    assert outbox.close(5)
    assert receiver.got == [{"number": 2}]


def test_a_closed_outbox_sends_what_is_left_as_soon_as_it_can(tmp_path: Path) -> None:
    receiver = Receiver(*[TimeoutError()] * 20)
    outbox = Outbox(tmp_path / "run", receiver)
    outbox.put({"number": 1})
    assert not outbox.close(0.01)
    deadline = time.monotonic() + 10
    while (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert receiver.got == [{"number": 1}]
    assert not (tmp_path / "run").exists()


def test_files_are_kept_as_they_were_when_they_were_put(tmp_path: Path) -> None:
    receiver = Receiver(ConnectionResetError(), ConnectionResetError())
    outbox = Outbox(tmp_path / "run", receiver)
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        path.write_text(text)
        outbox.put({}, path)
    path.unlink()
    assert outbox.close(5)
    assert receiver.texts == ["first", "second"]
    assert [Path(record["file"]).name for record in receiver.got] == ["a.txt", "a.txt"]


def test_a_full_disk_is_said_and_leaves_no_half_record(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "run", Receiver(*[ConnectionResetError()] * 5))
    outbox.put({"number": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        with pytest.raises(TrainingError, match=r"Can't write to .*run .*Make room, then run aga"):
            outbox.put({"long": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    outbox.put({"number": 2})
    records, end = Spool(tmp_path / "run").read()
    assert records == [{"number": 1}, {"number": 2}]
    assert end == Spool(tmp_path / "run").size
    assert outbox.close(5)


def test_numbers_that_are_none_come_through(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    spool.claim()
    spool.append({"a": float("nan"), "b": float("inf"), "c": 0.1 + 0.2, "d": "ü\u2028\n"})
    ((record,), end) = spool.read()
    assert record["a"] != record["a"]
    assert (record["b"], record["c"], record["d"]) == (float("inf"), 0.1 + 0.2, "ü\u2028\n")
    assert end == spool.size


KILLED = """\
import os, signal, sys
from pathlib import Path
from tasks.spool import Outbox

def away(spool, records):
    raise ConnectionResetError

outbox = Outbox(Path(sys.argv[1], "run"), away)
for number in range(25):
    outbox.put({"number": number})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_had_logged_is_found_whole(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    with (tmp_path / "run" / "records.jsonl").open("ab") as file:
        file.write(json.dumps({"number": 25}).encode()[:-2])
    (spool,) = orphans(tmp_path)
    records, _ = spool.read()
    assert records == [{"number": number} for number in range(25)]
    # Whoever takes it in hand keeps others away.
    spool.claim()
    assert [*orphans(tmp_path)] == []


def test_the_spool_of_a_living_process_is_no_orphan(tmp_path: Path) -> None:
    Spool(tmp_path / "run").claim()
    (tmp_path / "nobody").mkdir()
    assert [*orphans(tmp_path)] == []
    assert [*orphans(tmp_path / "none")] == []


def test_an_offer_leaves_a_refusal_to_those_who_must_hear_of_it(tmp_path: Path) -> None:
    receiver = Receiver(ValueError("refused"))
    outbox = Outbox(tmp_path / "run", receiver)
    outbox.put({"number": 1})
    deadline = time.monotonic() + 5
    while receiver.failures and time.monotonic() < deadline:
        time.sleep(0.01)
    outbox.offer({"number": 2})
    with pytest.raises(ValueError, match="refused"):
        outbox.settle(5)
    assert outbox.close(5)
    assert receiver.got == [{"number": 2}]
    outbox.offer({"number": 3})
    assert not (tmp_path / "run").exists()
