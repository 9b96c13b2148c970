"""Tests of flows.comparing: hand-made runs, and two real ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from rich.console import Console

from flows.comparing.choosing import MOST_RUNS, NEWEST, choose_runs
from flows.comparing.metric_rows import METRICS
from flows.comparing.pages import markdown, report_folder, show, write_report
from flows.comparing.runs import Comparison, compare_runs, curves, read_run
from plumbline.errors import MachineError, ParamsError
from plumbline.project import Project
from plumbline.refs import StepResult
from tasks import tracking
from tasks.delivery import dataset_record, deliver
from tasks.experiments import experiment_name

if TYPE_CHECKING:
    from tests.conftest import Trained

    MakeRun = Callable[..., str]

UNKNOWN = "0123456789abcdef" * 2
SCORE, KL, GOLD = "eval/policy/score", "eval/policy/kl", "eval/policy/gold"
HELD_OUT = {
    SCORE: 1.0, f"{SCORE}_low": 0.9, f"{SCORE}_high": 1.1,
    KL: 2.0, f"{KL}_low": 1.8, f"{KL}_high": 2.2,
}  # fmt: skip
STEPS = {"sft": "s", "reward_model": "r", "rl": "p", "evaluate": "e"}
"""Steps and the digests of what they made."""


def row(prompt: str, answer: str = "Sure.", score: float = 0.5, **more: Any) -> dict[str, Any]:
    """A row of the evaluation's table."""
    sft = {"sft": "Hm.", "sft_score": 0.0}
    return {"prompt": prompt, **sft, "policy": answer, "policy_score": score, **more}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, tables: Path) -> Iterator[Path]:
    """A project's folder for generated files, whose MLflow store this process uses."""
    cached = [f for f in vars(tracking).values() if hasattr(f, "cache_clear")]
    before = mlflow.get_tracking_uri()
    shutil.copyfile(tables, tmp_path / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_HOME", str(tmp_path))
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
        for function in cached:
            function.cache_clear()
        yield tmp_path
        mlflow.set_tracking_uri(before)
        for function in cached:
            function.cache_clear()


@pytest.fixture
def make_run(home: Path) -> MakeRun:
    """Makes a pipeline run with its steps, as a flow leaves them; returns its id."""
    experiment = tracking._experiment_id(home)
    client = MlflowClient()

    def make_step(parent: str, step: str, digest: str, prompts: str, files: dict[str, Any]) -> None:
        tags = {
            "mlflow.parentRunId": parent,
            "plumbline.kind": "step",
            "plumbline.step": step,
            "plumbline.digest": digest,
        }
        run_id = client.create_run(experiment, run_name=step, tags=tags).info.run_id
        for name, value in files.items():
            client.log_dict(run_id, value, name)
        if step == "evaluate":
            read = dataset_record("prompts", prompts, "p", {"num_rows": 2}, "evaluation")
            deliver(client, run_id, [read])
        client.set_terminated(run_id)

    def make(
        name: str = "tiny-1",
        *,
        metrics: Mapping[str, float] = HELD_OUT,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        steps: Mapping[str, str] = STEPS,
        samples: list[dict[str, Any]] | None = None,
        history: list[dict[str, float]] | None = None,
        prompts: str = "q",
    ) -> str:
        kind = {"plumbline.kind": "pipeline", "data.digest": "x.dir"}
        origin = {"git.commit": "c" * 40, "data.rev": f"{'d' * 32}.dir"}
        run = client.create_run(
            experiment, run_name=name, tags={**kind, **origin, **(tags or {})}
        ).info.run_id
        logged = [Param(key, str(value)) for key, value in (params or {}).items()]
        client.log_batch(run, [Metric(k, v, 0, 0) for k, v in metrics.items()], logged)
        rows = [row("Hi?")] if samples is None else samples
        table = {"columns": [*rows[0]], "data": [[*given.values()] for given in rows]}
        files = {"rl": {"history.json": history or []}, "evaluate": {"samples.json": table}}
        for step, digest in steps.items():
            make_step(run, step, digest, prompts, files.get(step, {}))
        client.set_terminated(run)
        return str(run)

    return make


@pytest.fixture
def make_bare(home: Path) -> MakeRun:
    """Makes a run with a name and a state alone, quickly; returns its id."""
    tracking._experiment_id(home)

    def make(name: str = "bare", status: str = "FINISHED", **changes: str) -> str:
        client = MlflowClient()
        tags = {
            "plumbline.kind": "pipeline",
            **{k.replace("__", "."): v for k, v in changes.items()},
        }
        (experiment,) = client.search_experiments(filter_string=f"name = '{experiment_name()}'")
        run_id = client.create_run(experiment.experiment_id, run_name=name, tags=tags).info.run_id
        if status != "RUNNING":
            client.set_terminated(run_id, status)
        return str(run_id)

    return make


def compared(*asked: str) -> Comparison:
    return compare_runs([read_run(run) for run in choose_runs(asked)])


def printed(found: Comparison, width: int = 200) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        show(console, found)
    return captured.get()


def figure() -> Figure:
    return Figure(figsize=(1, 1))


# Which runs are meant.


def test_without_names_the_newest_finished_runs_are_taken(make_bare):
    made = [make_bare(f"run-{number}") for number in range(NEWEST + 1)]
    make_bare("failed", "FAILED")
    make_bare("running", "RUNNING")
    make_bare("a step", plumbline__kind="step")

    assert [run.run_id for run in choose_runs([])] == made[:0:-1]


def test_a_run_is_meant_by_its_id_its_beginning_or_its_name(make_bare):
    first, second = make_bare("one"), make_bare("two")
    length = next(n for n in range(1, 33) if first[:n] != second[:n])

    asked = (second, first[:length])
    assert [run.run_id for run in choose_runs(asked)] == [second, first]
    assert [run.run_id for run in choose_runs(["two", "one"])] == [second, first]


def test_a_name_means_its_newest_finished_run(make_bare):
    make_bare("same")
    newest = make_bare("same")
    make_bare("same", "FAILED")

    assert [run.run_id for run in choose_runs(["same"])] == [newest]


def test_a_beginning_of_several_ids_is_refused_with_all_of_them(make_bare):
    ids = [make_bare(f"run-{number}") for number in range(17)]
    first = next(c for c in "0123456789abcdef" if sum(i.startswith(c) for i in ids) > 1)
    meant = [i for i in ids if i.startswith(first)]

    with pytest.raises(ParamsError, match=f"{first} begins the ids of {len(meant)} runs") as raised:
        choose_runs([first])
    assert all(run_id in str(raised.value) for run_id in meant[:5])


@pytest.mark.parametrize("text", [UNKNOWN, "nonsense", "", "' or 1=1", "../../etc", "%", '"'])
def test_an_unknown_run_is_refused_and_the_last_ones_are_named(make_bare, text):
    known = make_bare("run-1")

    with pytest.raises(ParamsError, match=r"no run .* in MLflow") as refusal:
        choose_runs([text])
    assert f"{known}  run-1" in str(refusal.value)


def test_a_slip_in_a_name_is_recognised(make_bare):
    make_bare("quickstart-kl0.05")

    with pytest.raises(ParamsError, match=r"did you mean quickstart-kl0\.05\?"):
        choose_runs(["quickstart-kl0.5"])


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_an_unfinished_run_is_refused(make_bare, status):
    finished, other = make_bare("finished"), make_bare("other", status)

    for text in (other, "other"):
        with pytest.raises(ParamsError, match=f"is {status}: expected a finished run") as refusal:
            choose_runs([text])
        assert finished in str(refusal.value)


def test_a_step_is_refused_and_its_pipeline_is_named(make_bare):
    pipeline = make_bare()
    step = make_bare("rl", plumbline__kind="step", mlflow__parentRunId=pipeline)

    with pytest.raises(ParamsError, match=f"it is a step of {pipeline}"):
        choose_runs([step])


def test_a_run_may_be_named_once(make_bare):
    run_id = make_bare("one")

    with pytest.raises(ParamsError, match=f"one and {run_id} are the same run"):
        choose_runs(["one", run_id])


def test_more_runs_than_can_be_told_apart_are_refused(home):
    with pytest.raises(ParamsError, match="at most 8 runs, got 9"):
        choose_runs(["a"] * (MOST_RUNS + 1))


def test_where_nothing_has_run_the_way_to_a_run_is_named(home):
    with pytest.raises(ParamsError, match="start with `plumbline run quickstart`"):
        choose_runs([])


# What is compared.


def test_metrics_have_their_intervals_and_the_best_is_marked(make_run):
    better = {**HELD_OUT, SCORE: 1.5, f"{SCORE}_low": 1.4, f"{SCORE}_high": 1.6, KL: 5.0}
    make_run("a")
    make_run("b", metrics={**better, "eval/policy/distinct_2": 0.25, "rl/warnings": 0.0})

    found = compared("a", "b")

    score, kl, distinct = (found.metrics[n] for n in (SCORE, KL, "eval/policy/distinct_2"))
    assert score.values["B"].model_dump() == {"value": 1.5, "low": 1.4, "high": 1.6}
    assert score.best == ["B"]
    # Neither more nor less KL is better.
    assert (kl.better, kl.best) == (None, [])
    assert distinct.values["A"] is None
    assert (distinct.values["B"].low, distinct.best) == (None, [])
    assert set(found.metrics) < {metric.name for metric in METRICS}
    text = printed(found)
    assert "*1.500 [1.400, 1.600]" in text
    assert "reward-model score ↑" in text
    assert "| reward-model score ↑ | 1.000 \\[0.900, 1.100\\] | **1.500** " in markdown(found)


def test_what_is_not_a_number_is_shown_and_never_best(make_run, home):
    broken = {SCORE: math.nan, f"{SCORE}_low": math.nan, f"{SCORE}_high": math.nan, KL: 1.0}
    make_run("a", metrics=broken)
    make_run("b", metrics={**HELD_OUT, SCORE: -1.0})
    make_run("c", metrics={**HELD_OUT, SCORE: -2.0})

    found = compared("a", "b", "c")

    assert math.isnan(found.metrics[SCORE].values["A"].value)
    assert found.metrics[SCORE].best == ["B"]
    assert "nan" in printed(found)
    write_report(found, figure(), home / "r")
    kept = json.loads((home / "r" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert kept["metrics"][SCORE]["values"]["A"]["value"] is None


def test_equal_values_have_no_best_and_ties_share_it(make_run):
    # As they are shown: that the first differs in the fifth place is no merit.
    for name, score in (("a", 1.00001), ("b", 1.0), ("c", 0.5)):
        make_run(name, metrics={**HELD_OUT, SCORE: score, GOLD: 0.5})

    found = compared("a", "b", "c")

    assert found.metrics[SCORE].best == ["A", "B"]
    assert found.metrics[GOLD].best == []


def test_scores_of_different_reward_models_have_no_best_and_it_is_said(make_run):
    for name, digest, score in (("a", "r", 1.0), ("b", "other", 2.0), ("c", "r", 3.0)):
        metrics = {**HELD_OUT, SCORE: score, GOLD: score}
        make_run(name, steps={**STEPS, "reward_model": digest}, metrics=metrics)

    found = compared("a", "b", "c")

    assert found.metrics[SCORE].best == []
    assert found.metrics[GOLD].best == ["C"]
    (note,) = found.notes
    assert note.startswith("Different reward models (A C | B): their scores are on different")
    assert note in printed(found)
    # Where only runs of one reward model have the metric, it is on one scale.
    assert compared("a", "c").metrics[SCORE].best == ["B"]


def test_different_held_out_prompts_are_said(make_run):
    make_run("a", prompts="q")
    make_run("b", prompts="other", metrics={**HELD_OUT, SCORE: 9.0})

    found = compared("a", "b")

    assert found.metrics[SCORE].best == []
    assert found.data == {"prompts (evaluation)": {"A": "q", "B": "other"}}
    assert found.notes[0].startswith("Different held-out prompts (A | B): ")


def test_only_what_differs_is_shown(make_run):
    params = {"seed": 0, "rl.kl_coef": 0.05, "description": "this"}
    more = {"rl.kl_coef": 0.1, "rl.whiten": True, "description": "that"}
    make_run("a", params=params, tags={"data.rev": f"{'1' * 32}.dir"})
    make_run("b", params={**params, **more}, tags={"git.commit": "e" * 40})

    found = compared("a", "b")

    assert found.params == {
        "rl.kl_coef": {"A": "0.05", "B": "0.1"},
        "rl.whiten": {"A": None, "B": "True"},
    }
    assert found.data == {"data.dvc": {"A": f"{'1' * 32}.dir", "B": f"{'d' * 32}.dir"}}
    assert found.code == {"git.commit": {"A": "c" * 40, "B": "e" * 40}}
    assert found.shared == ["sft", "reward_model", "rl", "evaluate"]
    text = printed(found)
    assert "cccccccccccc " in text
    assert "c" * 40 not in text
    assert "seed" not in text


def test_runs_that_differ_in_nothing_say_so(make_run):
    make_run("a")
    make_run("b")

    text = printed(compared("a", "b"))

    assert "The same in all runs: params, data, code and machine." in text


def test_one_run_is_shown_without_differences(make_run):
    make_run("a", params={"seed": 0})

    found = compared("a")

    assert found.params == {}
    assert found.metrics[SCORE].best == []
    assert "same in all runs" not in printed(found)
    assert "What differs" not in markdown(found)
    assert [sample.prompt for sample in found.samples] == ["Hi?"]


def test_edited_code_is_said_to_hide_differences(make_run):
    make_run("a", tags={"git.dirty": "true"})
    make_run("b", tags={"git.dirty": "true"})

    found = compared("a", "b")

    assert "git.dirty" not in found.code
    assert found.notes == [
        "A, B: files of the commit had been edited, so equal commits may be different code."
    ]


# Samples.


def test_the_prompts_that_all_runs_answered_stand_side_by_side(make_run):
    make_run("a", samples=[row("One?", "Yes."), row("Two?", "No."), row("Three?")])
    second = [row("Three?", policy_gold=0.0), row("Two?", "Maybe.", 0.75, policy_gold=1.0)]
    make_run("b", samples=second)

    found = compared("a", "b")

    assert [sample.prompt for sample in found.samples] == ["Two?", "Three?"]
    answers = found.samples[0].answers
    assert (answers["A"].text, answers["A"].scores) == ("No.", {"score": 0.5})
    assert (answers["B"].text, answers["B"].scores) == ("Maybe.", {"score": 0.75, "gold": 1.0})
    assert all(text in printed(found) for text in ("Two?", "No.", "Maybe.", "0.75"))
    assert "One?" not in markdown(found)


def test_a_prompt_that_stands_twice_is_left_out(make_run):
    make_run("a", samples=[row("Go on.", "One."), row("Go on.", "Two."), row("Hi?")])
    make_run("b", samples=[row("Go on.", "Three."), row("Hi?")])

    assert [sample.prompt for sample in compared("a", "b").samples] == ["Hi?"]


def test_disjoint_prompts_are_said(make_run):
    make_run("a", samples=[row("One?")])
    make_run("b", samples=[row("Two?")])

    found = compared("a", "b")

    assert found.samples == []
    assert (
        "No prompt was answered by all runs, so there are no samples side by side." in found.notes
    )


def test_runs_of_which_files_and_steps_are_gone_are_compared_in_what_is_left(make_run, home):
    make_run("a", history=[{"objective/kl": 1.0, "objective/scores": 0.5}])
    make_run("b", steps={}, metrics={})
    for file in (*home.rglob("samples.json"), *home.rglob("history.json")):
        file.unlink()

    reads = [read_run(run) for run in choose_runs(["a", "b"])]
    found = compare_runs(reads)

    assert [curve.history for curve in curves(reads)] == [[], []]
    assert found.metrics[SCORE].values["B"] is None
    assert found.notes == [
        "B: no held-out score and KL was logged, so the figure has no point.",
        "A, B: the evaluation's samples are not kept.",
    ]
    assert found.shared == []
    assert printed(found)


def test_a_cached_step_s_files_are_those_of_the_run_that_made_it(make_run, home):
    history = [{"objective/kl": 1.0, "objective/scores": 0.5}]
    made = make_run("a", history=history, samples=[row("Hi?", "Hello.")])
    steps = choose_runs(["a"])[0].steps
    second = make_run("b", steps={}, params={"evaluate.gold": "my.module:score"})
    experiment = tracking._experiment_id(home)
    again = tracking.PipelineRun(mlflow_run_id=second, experiment_id=experiment, name="b")
    for name, step in steps.items():
        source = StepResult(digest=step.digest or "", uri="", mlflow_run_id=step.run_id)
        tracking.stub_run(again, name, "key", source)

    reads = [read_run(run) for run in choose_runs([made, "b"])]

    assert compare_runs(reads).samples[0].answers["B"].text == "Hello."
    _, second = curves(reads)
    assert (second.mark, second.name, second.history) == ("B", "b", history)
    assert second.gold_curve == "objective/reward_score"
    assert compare_runs(reads).shared == [*STEPS]


# The pages.


def test_what_models_and_users_wrote_obeys_nobody(make_run):
    bad = "a | b\n<script>\x1b[31m ![x](http://x/y.png) [link](z) $e$"
    make_run("a", samples=[row(bad, bad)], params={"rl.reward": bad})
    make_run("b", samples=[row(bad, bad)])

    found = compared("a", "b")

    assert "\x1b" not in printed(found)
    page = markdown(found)
    assert "\x1b" not in page
    lines = [line for line in page.splitlines() if "script" in line]
    assert len(lines) == 4
    for line in lines:
        assert r"a \| b<br>\<script\>" in line
        assert r"\!\[x\]\(http://x/y.png\)" in line


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_shows_every_value_whole(make_run, width):
    for name in ("a", "b"):
        make_run(name)

    words = printed(compared("a", "b"), width).replace("\n", " ").split()

    assert words.count("1.000") == words.count("[0.900,") == words.count("1.100]") == 2


def test_a_report_is_written_whole_or_not_at_all(make_run, home):
    make_run("a")
    found = compared("a")

    class Broken(Figure):
        def savefig(self, *arguments: Any, **options: Any) -> None:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_report(found, Broken(), home / "reports" / "r")
    assert list((home / "reports").iterdir()) == []

    write_report(found, figure(), home / "reports" / "r")
    names = {path.name for path in (home / "reports" / "r").iterdir()}
    assert names == {"report.md", "comparison.json", "frontier.png"}


def test_a_folder_that_is_there_or_can_t_be_made_is_refused(tmp_path):
    project = Project(tmp_path, tmp_path / ".plumbline")
    (tmp_path / "file").write_text("")

    with pytest.raises(MachineError, match="expected a folder that is not there yet"):
        report_folder(project, tmp_path)
    for to in (tmp_path / "no" / "where", tmp_path / "file" / "below"):
        with pytest.raises(MachineError, match="in a folder that can be written to"):
            report_folder(project, to)
    assert report_folder(project, tmp_path / "new") == tmp_path / "new"
    assert report_folder(project, None).parent == project.reports


# Two real runs.


@pytest.fixture(scope="module")
def second(trained: Trained) -> dict[str, Any]:
    """A run that shares all steps before RL with the first."""
    return trained.project.result("run", "--set", "rl.kl_coef=0.5")


@pytest.fixture(scope="module")
def command(trained: Trained, second: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """What `compare` wrote with --json, its output, and the modules that it imported."""
    project, file = trained.project, trained.project.root / "compare.json"
    names = (trained.first["mlflow_run_id"], second["mlflow_run_id"][:12])
    done = project.cli("compare", *names, "--json", str(file), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_bytes()), done.stdout, done.stderr


def test_two_real_runs_differ_in_what_was_set_alone(command):
    found, output, _ = command

    assert found["params"] == {"rl.kl_coef": {"A": "0.05", "B": "0.5"}}
    assert (found["data"], found["code"], found["notes"]) == ({}, {}, [])
    assert found["shared"] == ["prepare_data", "base_model", "sft", "reward_model"]
    assert "rl.kl_coef" in output


def test_two_real_runs_have_all_headline_metrics_with_intervals(trained, second, command):
    found, output, _ = command

    for name in (GOLD, SCORE, KL, "eval/win_rate", "reward_model/accuracy"):
        values = found["metrics"][name]["values"]
        assert values["A"]["value"] == trained.first["metrics"][name]
        assert values["B"]["value"] == second["metrics"][name]
        assert values["B"]["low"] <= values["B"]["value"] <= values["B"]["high"]
        assert f"{values['B']['value']:.3f}" in output
    assert found["metrics"]["eval/policy/distinct_2"]["values"]["B"]["low"] is None
    # One reward model has one accuracy.
    assert found["metrics"]["reward_model/accuracy"]["best"] == []


def test_two_real_runs_answer_the_same_prompts(trained, command):
    found, output, _ = command
    held_out = {row["prompt"] for row in trained.project.rows("prompts")}

    assert len(found["samples"]) == 16
    for sample in found["samples"]:
        assert sample["prompt"] in held_out
        assert set(sample["answers"]) == {"A", "B"}
        assert set(sample["answers"]["A"]["scores"]) == {"score", "gold"}
    assert found["samples"][2]["prompt"] in output
    assert found["samples"][3]["prompt"] not in output


def test_the_report_of_two_real_runs_is_where_the_command_says(trained, command):
    found, output, _ = command
    folder = Path(found["folder"])

    assert folder.parent == trained.project.home / "reports"
    assert str(folder) in output
    assert (folder / "frontier.png").stat().st_size > 20_000
    kept = json.loads((folder / "comparison.json").read_bytes())
    assert kept == {name: value for name, value in found.items() if name != "folder"}
    page = (folder / "report.md").read_text()
    assert page.count("| score | gold | answer |") == len(found["samples"])
    assert "![reward against KL](frontier.png)" in page


def test_a_comparison_needs_no_torch(command):
    imported = {line.rpartition("|")[2].strip() for line in command[2].splitlines()}

    assert "mlflow" in imported
    assert not imported & {"torch", "transformers"}


def test_a_comparison_that_can_t_be_is_refused_with_exit_code_2(trained):
    done = trained.project.cli("compare", "nonsense")

    assert done.returncode == 2
    assert trained.first["mlflow_run_id"] in done.stderr
