"""The files that a run leaves for people: figures, samples, and its summary."""

import json
import shutil
import tempfile
from pathlib import Path

from flows.headline import estimates, headline
from flows.summary import RunSummary
from plumbline.project import Project
from plumbline.refs import StepResult
from tasks import tracking

PICTURES = (
    "curves.png",
    "reward-kl.png",
    "scores.png",
    *(
        f"{model}_{kind}.png"
        for model in ("reward_model", "judge")
        for kind in ("scores", "calibration")
    ),
)


def read_samples(evaluation: StepResult) -> list[dict[str, object]]:
    """The evaluation's table of samples, a dict a row."""
    table = json.loads(tracking.open_uri(evaluation.uri).read_bytes())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def write_report(project: Project, summary: RunSummary, results: dict[str, StepResult]) -> None:
    """Write figures, report.md and summary.json to the run's folder, all at once or not at all."""
    assert summary.report is not None
    folder = Path(summary.report)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    for result in results.values():
        for name, uri in result.figures.items():
            if name in PICTURES:
                shutil.copyfile(tracking.open_uri(uri), aside / name)
    (aside / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n")
    (aside / "report.md").write_text(markdown(summary))
    aside.rename(folder)
    assert summary.mlflow_run_id is not None
    for path in sorted(folder.iterdir()):
        tracking.log_file(summary.mlflow_run_id, path)


def markdown(summary: RunSummary) -> str:
    """The run on a page: steps, headline metrics, samples."""
    lines = [f"# {summary.experiment}", "", "| step | status | seconds |", "|---|---|---:|"]
    lines += [f"| {n} | {s.status} | {s.seconds:.1f} |" for n, s in summary.steps.items()]
    lines += ["", "| metric | SFT | policy |", "|---|---:|---:|"]
    lines += [
        f"| {label} | {sft:.3f} | {policy:.3f} |"
        for label, sft, policy in headline(summary.metrics)
    ]
    lines += ["", "| estimate | with its 95% interval |", "|---|---:|"]
    lines += [f"| {label} | {estimate} |" for label, estimate in estimates(summary.metrics)]
    lines += ["", "![curves](curves.png)", "", "![reward against KL](reward-kl.png)", ""]
    lines += ["| prompt | SFT | policy |", "|---|---|---|"]
    lines += [
        "| " + " | ".join(_cell(row[key]) for key in ("prompt", "sft", "policy")) + " |"
        for row in summary.samples
    ]
    return "\n".join(lines) + "\n"


def _cell(text: object) -> str:
    """A text in a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", "<br>")
