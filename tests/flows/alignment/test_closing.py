"""Tests of flows.alignment.closing."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from flows.alignment.closing import show_summary, ui_commands
from flows.alignment.reports import Origin, markdown, write_report
from flows.alignment.summary import RunSummary, StepSummary
from flows.services.pages import MlflowPages
from plumbline.params.schema import Experiment, steps_of
from plumbline.project import Project
from plumbline.refs import StepResult

STEPS = steps_of(Experiment())

METRICS = {
    f"{model}/{name}": 0.5
    for model in ("eval/sft", "eval/policy")
    for name in ("score", "gold", "kl", "length_mean", "distinct_1", "distinct_2")
}
INTERVALS = {
    f"{name}{end}": 0.75
    for name in ("eval/win_rate", "reward_model/accuracy")
    for end in ("", "_low", "_high")
}
STEP = StepSummary(status="ran", seconds=1.0, key="k", digest="d", mlflow_run_id="r")


def summary(
    tmp_path: Path, answer: str = "Sure.", metrics: dict[str, float] = METRICS
) -> RunSummary:
    sample = {"prompt": answer, "sft": answer, "policy": answer}
    return RunSummary(
        experiment="tiny",
        data={"rev": "r", "digest": "d"},
        mlflow_run_id="m",
        prefect_flow_run_id="p",
        seconds=3.0,
        steps=dict.fromkeys(STEPS, STEP),
        metrics={**metrics, **INTERVALS},
        report=str(tmp_path),
        samples=[{**sample, "sft_score": 0.25, "policy_score": 0.5}],
        registered={"name": "plumbline-policy", "version": "3", "alias": "challenger"},
    )


def shown(tmp_path: Path, told: RunSummary) -> str:
    console = Console(file=io.StringIO(), width=300)
    show_summary(console, Project(tmp_path, tmp_path / ".plumbline"), told)
    return console.file.getvalue()


def test_the_closing_words_have_samples_metrics_steps_and_the_way_to_the_uis(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"")

    text = shown(tmp_path, summary(tmp_path, "An answer."))

    for words in (
        "An answer.",
        "before (SFT)",
        "after (RL)",
        "gold score",
        "0.750 [0.750, 0.750]",
        "curves.png",
        "plumbline-policy version 3, alias challenger",
        *STEPS,
        *ui_commands(Project(tmp_path, tmp_path / ".plumbline")).values(),
    ):
        assert words in text


def test_real_data_without_a_gold_scorer_is_shown_without_one(tmp_path):
    without = {name: value for name, value in METRICS.items() if not name.endswith("gold")}

    assert "gold score" not in shown(tmp_path, summary(tmp_path, metrics=without))


@pytest.mark.parametrize("answer", ["[/INST] Sure.", "[bold]Sure", "a[0] = b[/]", "[red]"])
def test_brackets_in_an_answer_are_shown_as_they_are(tmp_path, answer):
    assert answer in shown(tmp_path, summary(tmp_path, answer))


def test_an_answer_cannot_steer_the_terminal(tmp_path):
    assert "\x1b" not in shown(tmp_path, summary(tmp_path, "Sure\x1b]0;title\x07\x1b[31m."))


def test_a_line_break_or_bar_in_an_answer_does_not_break_the_report(tmp_path):
    pages = MlflowPages("http://127.0.0.1:5000", up=True, experiment_id="1")
    text = markdown(summary(tmp_path, "One | two\nthree"), {}, Origin("tiny-1", {}, {}), pages)

    lines = [line for line in text.splitlines() if "three" in line]
    assert lines[0] == "**One \\| two<br>three**"
    assert lines[1] == "- *SFT, score 0.25*: One \\| two<br>three"
    assert len(lines) == 3


def test_a_report_that_can_not_be_written_leaves_nothing(tmp_path):
    reported = summary(tmp_path).model_copy(update={"report": str(tmp_path / "reports" / "r")})
    made = StepResult(
        digest="d", uri="", mlflow_run_id="r", figures={"curves.png": f"{tmp_path}/gone.png"}
    )

    with pytest.raises(FileNotFoundError):
        write_report(
            Project(tmp_path, tmp_path), reported, {"rl": made}, Origin("n", {}, {}),
            MlflowPages("http://127.0.0.1:5000", up=True, experiment_id="1"),
        )  # fmt: skip

    assert list((tmp_path / "reports").iterdir()) == []
