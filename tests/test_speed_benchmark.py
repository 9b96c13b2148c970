"""What `make bench` makes of its measurements: statistics, the file, the page, and one process."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.speed import gpu, report, worker
from benchmarks.speed.__main__ import Bench
from benchmarks.speed.machine import Code
from benchmarks.speed.parts import all_parts
from benchmarks.speed.process import ProcessError, run_command
from benchmarks.speed.sections import Results, judged_difference
from benchmarks.speed.store import Measurement, Store, digest
from benchmarks.speed.summary import Bar, Difference, Line, Spread, number, ratios
from benchmarks.speed.worker import rows_of

MACHINE = {
    "cpu": "A processor", "cores": 2, "memory_gb": 24, "system": "Linux", "python": "3.11",
    "packages": {"torch": "2.13.0"},
}  # fmt: skip
PARTS = all_parts("full", Path("works"))


def measurement(part, side, turn, result, key="k", others=0.0, commit="abc1234"):
    return Measurement(part, side, turn, key, commit, "2026-11-23 12:00", 1.0, others, result)


def ppo(episodes_per_s, peak_mb, scores):
    return {
        "episodes": 320, "episodes_per_s": episodes_per_s,
        "episodes_per_s_from_start": episodes_per_s / 2, "peak_mb": peak_mb,
        "phases": {"rollout": 1.0, "score": 2.0, "update": 3.0},
        "packages": {"trl": "1.12.0"},
        "judged": {"scores": scores, "mean": sum(scores) / len(scores), "ended_share": 0.5},
    }  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """Two turns of PPO, in which the machine was half as fast in the second."""
    store = Store(tmp_path / "benchmarks.json", MACHINE)
    rows = {
        ("plumbline", 0): ppo(24.0, 600.0, [1.0, 2.0, 3.0]),
        ("plumbline", 1): ppo(12.0, 620.0, [1.0, 2.0, 3.0]),
        ("TRL, its defaults", 0): ppo(4.0, 1000.0, [0.5, 1.5, 2.8]),
        ("TRL, its defaults", 1): ppo(2.0, 1000.0, [0.5, 1.5, 2.8]),
        ("TRL, bf16 autocast", 0): ppo(10.0, 1100.0, [0.5, 1.5, 2.8]),
        ("TRL, bf16 autocast", 1): ppo(5.0, 1100.0, [0.5, 1.5, 2.8]),
        ("TRL, bf16 weights", 0): ppo(12.0, 700.0, [0.5, 1.5, 2.8]),
    }
    for (side, turn), result in rows.items():
        store.add(measurement("ppo-a", side, turn, result))
    return store


def test_a_spread_is_the_median_with_the_extremes():
    assert Spread.of([3.0, 1.0, 10.0]) == (3.0, 1.0, 10.0)
    assert Spread.of([3.0, 1.0]) == (2.0, 1.0, 3.0)
    assert f"{Spread.of([3.0, 1.0, 10.0])}" == "3 [1, 10]"
    assert f"{Spread.of([3.0])}" == "3"
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_ratios_are_taken_turn_by_turn():
    # The medians alone would say 9 / 2.
    assert ratios({0: 8.0, 1: 10.0}, {0: 1.0, 1: 5.0, 2: 2.0}) == (5.0, 2.0, 8.0)


def test_a_line_and_its_r_squared():
    line = Line.through([1, 2, 3, 4], [5, 7, 9, 11])
    assert line == pytest.approx((2.0, 3.0, 1.0))
    # By hand: the means are 2 and 2, the slope 1/2, the residuals -1/2, 1, -1/2.
    assert Line.through([1, 2, 3], [1, 3, 2]) == pytest.approx((0.5, 1.0, 1 - 1.5 / 2))
    with pytest.raises(ValueError, match="three different x"):
        Line.through([1, 1, 2], [1, 2, 3])


def test_a_difference_has_its_interval():
    # The standard deviation of 0 and 2 is the root of 2, and its error 1.
    assert Difference.of([0.0, 2.0]) == pytest.approx((1.0, 1 - 1.96, 1 + 1.96))


@pytest.mark.parametrize(
    ("bar", "value", "verdict"),
    [
        (Bar(5, at_least=True), 5.0, "reached"),
        (Bar(5, at_least=True), 4.0, "**missed by 20%**"),
        (Bar(0.5, at_least=False), 0.5, "reached"),
        (Bar(0.5, at_least=False), 0.6, "**missed by 20%**"),
        (Bar(0, at_least=True), -0.25, "**missed by 0.25**"),
    ],
)
def test_a_bar_says_by_how_much_it_was_missed(bar, value, verdict):
    assert bar.verdict(value) == verdict


def test_numbers_have_three_digits_that_count():
    assert [number(v) for v in (0.012345, 1.2345, 99.94, 1234.5)] == [
        "0.0123", "1.23", "99.9", "1,234",
    ]  # fmt: skip


def test_the_bars_hold_the_median_of_the_turns_ratios_against_the_fastest_peer(store):
    rows = [line.strip("| ").split(" | ") for line in report.bars_table(store).splitlines()[2:]]
    assert rows == [
        ["ppo-a", "episodes/s over TRL, its defaults", "6", "≥ 5", "reached"],
        # Of the two that have bf16 the faster one, in the turn that it has.
        ["ppo-a", "episodes/s over TRL, bf16 weights", "2", "≥ 3", "**missed by 33.3%**"],
        [
            "ppo-a", "peak memory over TRL, its defaults", "0.61 [0.6, 0.62]", "≤ 0.5",
            "**missed by 22%**",
        ],
        [
            "ppo-a", "reward less that of TRL, its defaults, 95% interval",
            "+0.400 [+0.204, +0.596]", "not lower", "reached",
        ],
    ]  # fmt: skip


def test_rewards_are_compared_prompt_by_prompt(store):
    difference = judged_difference(Results(PARTS["ppo-a"], store.of("ppo-a")), "TRL, its defaults")
    assert difference.mean == pytest.approx((0.5 + 0.5 + 0.2) / 3)


def test_the_page_keeps_what_is_written_by_hand(store):
    page = f"# Benchmarks\n\nBefore.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n"
    new = report.replace(page, report.page_tables(store))
    assert new.startswith("# Benchmarks\n\nBefore.\n")
    assert new.endswith(f"{report.END}\n\nAfter.\n")
    assert "old" not in new
    assert "| TRL, bf16 autocast | 7.5 [5, 10] | 2.4 | 3.75 [2.5, 5] | 2.4 |" in new
    assert report.replace(new, report.page_tables(store)) == new
    with pytest.raises(SystemExit, match="only one"):
        report.replace(f"text\n{report.BEGIN}\n", "block")


def test_a_table_says_that_the_machine_was_busy(store):
    assert "Others took" not in report.page_tables(store)
    store.add(measurement("ppo-a", "plumbline", 1, ppo(12.0, 620.0, [1.0, 2.0, 3.0]), others=0.3))
    assert "during: plumbline, turn 2 (30%)." in report.page_tables(store)


def test_measurements_are_on_disk_and_found_by_their_key(store):
    again = Store.read(store.path)
    assert again.machine == MACHINE
    assert sorted(again.measurements) == sorted(store.measurements)
    assert again.find("ppo-a", "plumbline", 0, "k") is not None
    assert again.find("ppo-a", "plumbline", 0, "other") is None
    again.add(measurement("ppo-a", "plumbline", 0, {}, key="other"))
    assert len(again.measurements) == len(store.measurements)
    again.keep("ppo-a", [("plumbline", 0)])
    assert [(m.side, m.turn) for m in Store.read(store.path).measurements] == [("plumbline", 0)]


def test_every_part_has_a_table_and_only_parts_with_both_sides_have_claims():
    assert {part.kind for part in PARTS.values()} == report.SECTIONS.keys() == report.CLAIMS.keys()
    assert {part.name for part in gpu.gpu_parts(quick=True, trl=None).values()} == {
        f"{work}-{model}" for work in ("ppo", "sft", "reward", "update") for model in gpu.SHAPES
    }


def test_a_turn_that_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "benchmarks.json", MACHINE)
    bench = Bench("quick", tmp_path / "none", store, again=False)
    measured = []
    monkeypatch.setattr(bench, "_measure", _fake(measured))
    bench.code = Code("abc1234", digest("tree"), is_clean=True)
    part = bench.parts["vocabulary"]

    bench.run(part)
    assert len(measured) == len(part.sides)
    bench.run(part)
    assert len(measured) == len(part.sides)
    bench.code = Code("abc1235", digest("another tree"), is_clean=True)
    bench.run(part)
    assert len(measured) == 2 * len(part.sides)
    # Nobody knows what files that were edited are.
    bench.code = bench.code._replace(is_clean=False)
    bench.run(part)
    assert len(measured) == 3 * len(part.sides)


def _fake(measured):
    from benchmarks.speed.process import Measured

    def measure(part, side, turn):
        measured.append((side.name, turn))
        return Measured({}, 1.0, 0.0)

    return measure


def test_parts_without_their_data_are_skipped_with_the_place_where_it_is_looked_for(tmp_path):
    bench = Bench("quick", tmp_path / "pairs.gz", Store(tmp_path / "b.json", MACHINE), again=False)
    assert "pairs.gz" in str(bench.missing(bench.parts["ppo-a"]))
    assert bench.missing(bench.parts["vocabulary"]) is None


def test_a_process_says_one_line_whatever_libraries_print(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "from benchmarks.speed.worker import peak_mb, serve\n"
        "def work(spec):\n"
        "    print('a library prints')\n"
        "    return {'got': spec, 'peak_mb': peak_mb()}\n"
        "serve(work)\n"
    )
    root = str(Path(report.__file__).parents[2])
    measured = run_command(
        [sys.executable, str(script), json.dumps({"a": 1})], {"PYTHONPATH": root}
    )
    assert measured.result["got"] == {"a": 1}
    assert 5 < measured.result["peak_mb"] < 500
    assert measured.seconds > 0
    with pytest.raises(ProcessError, match="ended with 1"):
        run_command([sys.executable, "-c", "raise SystemExit('no')"], {})


def test_random_rows_are_the_same_for_both_sides():
    model = {"shape": {"vocab_size": 50}, "rows": 20, "prompt": [4, 9], "response": [2, 5]}
    rows = rows_of(model)
    assert rows == rows_of(model)
    lengths = [len(query) for query in rows["queries"]]
    assert min(lengths) >= 4
    assert max(lengths) <= 9
    assert len(set(lengths)) > 1
    assert all(3 <= token < 50 for query in rows["queries"] for token in query)


def test_the_first_batch_is_not_counted_in_ppos_speed(monkeypatch):
    # The clock begins at 10; batches of 6, 2 and 4 s, and a second until the block is left.
    times = iter([10.0, 16.0, 18.0, 22.0, 23.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(times))
    with worker.timed() as clock:
        for _ in range(3):
            clock.lap()
    speed = worker.episodes_of({"episodes": 24, "batch": 8}, clock)
    assert speed["batch_seconds"] == [6, 2, 4]
    assert speed["seconds"] == 13
    assert speed["episodes_per_s"] == 16 / 6
    assert speed["episodes_per_s_from_start"] == 24 / 13


def test_a_single_batch_is_counted(monkeypatch):
    times = iter([0.0, 4.0, 5.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(times))
    with worker.timed() as clock:
        clock.lap()
    assert worker.episodes_of({"episodes": 8, "batch": 8}, clock)["episodes_per_s"] == 2
