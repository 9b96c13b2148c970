"""What a run leaves for people: figures, samples, and its report."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flows.alignment.headline import estimates, headline
from flows.alignment.summary import RunSummary
from flows.markdown import link, literal, table_head, table_row
from flows.services.pages import MlflowPages
from plumbline.project import Project
from plumbline.refs import ModelRef, StepResult
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
FIGURES = {"curves.png": "curves", "reward-kl.png": "reward against KL"}
"""Those that stand in the report, with what they show."""
SHOWN_SAMPLES = 12
WARNING = "warning."
"""Begins the tags of a step's run that hold what the monitor saw."""


class Origin(NamedTuple):
    """What a run was made from."""

    name: str
    """Of the run in MLflow."""
    overrides: Mapping[str, object]
    tags: Mapping[str, str]
    """Of the run in MLflow."""


def read_samples(evaluation: StepResult) -> list[dict[str, object]]:
    """The evaluation's table of samples, a dict a row."""
    table = json.loads(tracking.open_uri(evaluation.uri).read_bytes())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def write_report(
    project: Project,
    summary: RunSummary,
    results: Mapping[str, StepResult],
    origin: Origin,
    pages: MlflowPages,
) -> str:
    """Write figures, report.md and summary.json to the run's folder, all at once or not at all.

    They are logged to the run in MLflow, too, with the table of samples. Returns the report.
    """
    assert summary.report is not None
    assert summary.mlflow_run_id is not None
    folder = Path(summary.report)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        for result in results.values():
            for name, uri in result.figures.items():
                if name in PICTURES:
                    shutil.copyfile(tracking.open_uri(uri), aside / name)
        report = markdown(summary, results, origin, pages)
        (aside / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n")
        (aside / "report.md").write_text(report, encoding="utf-8")
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in sorted(folder.iterdir()):
        tracking.log_file(summary.mlflow_run_id, path)
    # On the pipeline's own run, so that MLflow lays the answers of several runs side by side.
    tracking.log_table(summary.mlflow_run_id, tracking.open_uri(results["evaluate"].uri))
    note = "\n\n".join([*_verdict(summary), f"Prefect flow run `{summary.prefect_flow_run_id}`."])
    tracking.tag_run(summary.mlflow_run_id, {"mlflow.note.content": note})
    return report


def markdown(
    summary: RunSummary,
    results: Mapping[str, StepResult],
    origin: Origin,
    pages: MlflowPages,
) -> str:
    """The run on a page: what came out, figures, answers, steps, and what it was made from."""
    parts = (
        _headline(summary, results),
        _figures(results),
        _answers(summary),
        _steps(summary, results, pages),
        _origin(summary, origin),
        _ways_on(summary, origin, pages),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def _headline(summary: RunSummary, results: Mapping[str, StepResult]) -> Iterator[str]:
    yield f"# {literal(summary.experiment)}"
    for sentence in _verdict(summary):
        yield from ("", sentence)
    for warning in _warnings(results):
        yield from ("", f"> ⚠️ {literal(warning)}")
    yield from ("", *table_head("held-out prompts", "SFT", "policy", right=2))
    for label, sft, policy in headline(summary.metrics):
        yield table_row(label, f"{sft:.3f}", f"{policy:.3f}")
    yield from ("", *table_head("estimate", "with its 95% interval", right=1))
    for label, estimate in estimates(summary.metrics):
        yield table_row(label, literal(estimate))


def _verdict(summary: RunSummary) -> Iterator[str]:
    """What came out, in sentences."""
    m = summary.metrics
    prompts = f"{m.get('eval/prompts', 0):.0f} held-out prompts"
    yield (
        f"The policy's answer beats the SFT model's on **{_percent(m, 'eval/win_rate')}** of "
        f"{prompts} by the reward model, at a KL of {m['eval/policy/kl']:.2f} nats a response."
    )
    others = {"gold": "the gold scorer", "judge": "the judge, which training never follows"}
    for name, who in others.items():
        if f"eval/{name}_win_rate" in m:
            yield (
                f"By {who}: on **{_percent(m, f'eval/{name}_win_rate')}**; mean score "
                f"{m[f'eval/sft/{name}']:.2f} → {m[f'eval/policy/{name}']:.2f}."
            )


def _percent(metrics: Mapping[str, float], name: str) -> str:
    """A share with its interval: "90 % [86, 94]"."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return literal(f"{100 * metrics[name]:.0f} %{interval}")


def _warnings(results: Mapping[str, StepResult]) -> list[str]:
    """What the monitor saw while the policy was trained."""
    result = results.get("rl")
    if result is None or not result.metrics.get("rl/warnings"):
        return []
    tags = tracking.tags_of(result.mlflow_run_id)
    return [
        f"{name.removeprefix(WARNING)}, {text}"
        for name, text in sorted(tags.items())
        if name.startswith(WARNING)
    ]


def _figures(results: Mapping[str, StepResult]) -> Iterator[str]:
    made = {name for result in results.values() for name in result.figures}
    for name, what in FIGURES.items():
        if name in made:
            yield from ("", picture(name, what))


def picture(name: str, what: str) -> str:
    """A figure in the report's folder."""
    return f"![{what}]({name})"


def _answers(summary: RunSummary) -> Iterator[str]:
    rows = spread(summary.samples, SHOWN_SAMPLES)
    yield from ("", "## Answers", "")
    yield (
        f"{len(rows)} of {len(summary.samples)}, from where the policy's score gains most to where "
        "it loses most; samples.json has them all."
    )
    # No table: Prefect's page does not break the lines in one.
    for row in rows:
        yield from ("", f"**{literal(str(row['prompt']))}**", "")
        for model, name in (("sft", "SFT"), ("policy", "policy")):
            yield f"- *{name}, {_scores(row, model)}*: {literal(str(row[model]))}"


def _scores(row: Mapping[str, Any], model: str) -> str:
    known = {name: row.get(f"{model}_{name}") for name in ("score", "gold", "judge")}
    return ", ".join(f"{name} {float(v):.2f}" for name, v in known.items() if v is not None)


def spread(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Some of the samples, over the whole range of gains: the best alone would flatter."""
    ordered = sorted(
        samples,
        key=lambda row: float(row["policy_score"]) - float(row["sft_score"]),
        reverse=True,
    )
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _steps(
    summary: RunSummary, results: Mapping[str, StepResult], pages: MlflowPages
) -> Iterator[str]:
    yield from ("", f"## Steps, {summary.seconds:.0f} s", "")
    yield from table_head("step", "status", "in MLflow", "seconds", right=1)
    for name, step in summary.steps.items():
        result = results.get(name)
        links = [link("run", pages.run(step.mlflow_run_id))]
        if isinstance(result, ModelRef):
            links.append(link("model", pages.model(result.mlflow_model_id)))
        if result is not None and step.status == "cached":
            links.append(link("made by", pages.run(result.mlflow_run_id)))
        yield table_row(literal(name), step.status, " · ".join(links), f"{step.seconds:.1f}")


def _origin(summary: RunSummary, origin: Origin) -> Iterator[str]:
    yield from ("", "## Made from", "", *table_head("", ""))
    changes = ", ".join(f"{name}={value}" for name, value in origin.overrides.items())
    commit = origin.tags.get("git.commit")
    edited = " and edits" if origin.tags.get("git.dirty") == "true" else ""
    facts = {
        "experiment": f"params/{summary.experiment}.yaml",
        "changes": changes or "none",
        "data": f"{summary.data['digest']} of data.dvc {summary.data['rev']}",
        "code": f"commit {commit}{edited}" if commit else "no git repository",
    }
    for name, value in facts.items():
        yield table_row(name, literal(value))


def _ways_on(summary: RunSummary, origin: Origin, pages: MlflowPages) -> Iterator[str]:
    name, version = summary.registered["name"], summary.registered["version"]
    alias = summary.registered.get("alias")
    called = f"{name}@{alias}" if alias else f"{name}/{version}"
    assert summary.mlflow_run_id is not None
    yield from ("", "## Look closer", "")
    yield f"- MLflow: {link(origin.name, pages.run(summary.mlflow_run_id))}"
    alias_said = f", alias {literal(alias)}" if alias else ""
    shown = link(f"{name} version {version}", pages.version(name, version))
    yield f"- Registered: {shown}{alias_said}; talk to it: `plumbline chat {called}`"
    yield f"- {link('All runs', pages.runs())}; `plumbline compare` lays some side by side"
    if summary.prefect_flow_run_id:
        yield f"- Prefect: flow run `{summary.prefect_flow_run_id}`"
    if pages.how_to_open:
        yield f"- {pages.how_to_open}"
