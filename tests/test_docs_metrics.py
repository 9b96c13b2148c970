"""docs/metrics.md defines every metric that a run logs, and every warning of the monitor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient

from plumbline.params.schema import RLParams
from plumbline.training import monitor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.conftest import Trained

METRICS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def defined_names() -> list[str]:
    """What stands in the first column of the tables: names and patterns of names."""
    rows = METRICS.read_text(encoding="utf-8").splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of the document means this metric.

    `{a,b}` is one of the parts, which may be empty; `*` and CAPITALS are text without a slash.
    """
    regex = ""
    for part in re.findall(r"\{[^}]*\}|\*|[A-Z]+|.", pattern):
        if part.startswith("{"):
            regex += "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
        else:
            regex += "[^/]+" if part == "*" or part.isupper() else re.escape(part)
    return re.fullmatch(regex, name) is not None


def undefined(names: Iterable[str]) -> set[str]:
    """The names that no pattern of the document means."""
    patterns = defined_names()
    return {name for name in names if not any(matches(pattern, name) for pattern in patterns)}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("objective/kl", "objective/kl", True),
        ("objective/kl", "objective/kl_coef", False),
        ("objective/kl", "rl/objective/kl", False),
        ("*/grad_norm", "policy/grad_norm", True),
        ("*/grad_norm", "rl/policy/grad_norm", False),
        ("*/grad_norm", "policy/norm", False),
        ("eval/{sft,policy}/score", "eval/policy/score", True),
        ("eval/{sft,policy}/score", "eval/judge/score", False),
        ("eval/win_rate{,_low,_high}", "eval/win_rate", True),
        ("eval/win_rate{,_low,_high}", "eval/win_rate_low", True),
        ("eval/win_rate{,_low,_high}", "eval/win_rate_std", False),
        ("objective/reward_NAME", "objective/reward_gold_score", True),
        ("objective/reward_NAME", "objective/reward_", False),
        ("data/TABLE/SPLIT_rows", "data/prompts/train_rows", True),
        ("data/TABLE/SPLIT_rows", "data/train_rows", False),
        ("eval/best_of_N/{score,gold}{,_low,_high}", "eval/best_of_16/gold_high", True),
        ("eval/best_of_N/kl_bound", "eval/best_of_16/kl.bound", False),
    ],
)
def test_patterns_mean_the_names_that_they_describe(
    pattern: str, name: str, expected: bool
) -> None:
    assert matches(pattern, name) is expected


def test_a_name_that_stands_nowhere_is_noticed() -> None:
    assert undefined(["objective/kl", "objective/kl_k9"]) == {"objective/kl_k9"}


def test_no_metric_is_defined_twice() -> None:
    names = defined_names()
    assert sorted(names) == sorted(set(names))


def test_every_metric_of_a_run_is_defined(trained: Trained) -> None:
    client = MlflowClient(f"sqlite:///{trained.project.home / 'mlflow.db'}")
    runs = [trained.first["mlflow_run_id"]]
    runs += [step["mlflow_run_id"] for step in trained.first["steps"].values()]
    logged = {name for run in runs for name in client.get_run(run).data.metrics}
    assert {"sft/loss", "objective/kl", "eval/policy/score"} <= logged
    assert undefined(logged) == set()


def test_every_warning_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (
        "kl_runaway", "entropy_collapse", "over_optimisation", "length_drift", "ratio_explosion",
        "negative_k3", "all_clipped",
    ):  # fmt: skip
        monkeypatch.setattr(monitor, rule, lambda *_: "seen")
    params = RLParams(rewards={"scorers.brevity": 0.0})
    warnings = {finding.name for finding in monitor.find_failures([{}], params)}
    assert len(warnings) == 8
    assert undefined(warnings) == set()
