"""What the shared training loop reports, when it stops, and what it leaves behind."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plumbline.errors import TrainingError
from plumbline.params.schema import SupervisedParams
from plumbline.training.supervised import fit

Metrics = Mapping[str, float]


class Line(nn.Module):
    """y = weight * x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "x": torch.tensor([row["x"] for row in batch]),
        "labels": torch.tensor([row["y"] for row in batch]),
    }


def squared(outputs: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return (outputs - labels).square().sum() / num_items_in_batch


# Each row is a sequence of one token, and there is no head.
SHAPE: dict[str, Any] = {"lengths": lambda _: [1], "predicting": lambda _: 0, "packed": True}
PERF = {
    "perf/tokens_per_s", "perf/rows_per_s", "perf/flops_per_s", "perf/mfu", "perf/padding_share",
    "time/update_s",
}  # fmt: skip


def params(**changes: Any) -> SupervisedParams:
    defaults: dict[str, Any] = {
        "epochs": 10, "batch_size": 4, "micro_batch_tokens": 2, "learning_rate": 0.1,
        "schedule": "constant", "warmup_fraction": 0.0, "max_grad_norm": 1e9,
    }  # fmt: skip
    return SupervisedParams(**{**defaults, **changes})


def run(
    settings: SupervisedParams, rows: list[dict[str, float]]
) -> tuple[Line, list[tuple[int, Metrics]], list[tuple[int, int]]]:
    logged: list[tuple[int, Metrics]] = []
    done: list[tuple[int, int]] = []
    model = Line()
    fit(
        model, rows, collate, settings, section="sft", **SHAPE, loss=squared, seed=0,
            precision="fp32",
        log=lambda step, metrics: logged.append((step, metrics)),
        progress=lambda *state: done.append(state),
    )  # fmt: skip
    return model, logged, done


ROWS = [{"x": 1.0 + row / 8, "y": 2.0 + row / 4} for row in range(8)]


def test_it_learns() -> None:
    model, _, _ = run(params(epochs=60), ROWS)
    assert model.weight.item() == pytest.approx(2, abs=0.02)


def test_metrics_are_named_after_the_section() -> None:
    _, logged, _ = run(params(), ROWS)
    assert [step for step, _ in logged] == [10, 20]
    assert set(logged[0][1]) == {"sft/loss", "sft/grad_norm", "sft/lr", "sft/epoch"} | PERF
    assert logged[0][1]["sft/epoch"] == 5
    assert logged[0][1]["sft/lr"] == 0.1
    assert logged[1][1]["sft/loss"] < logged[0][1]["sft/loss"]


def test_further_metrics_are_asked_for_at_each_log() -> None:
    logged: list[Metrics] = []

    class Asked:
        times = 0

        def take(self) -> Metrics:
            self.times += 1
            return {"sft/asked": float(self.times)}

        def state(self) -> dict[str, Any]:
            return {}

        def restore(self, state: dict[str, Any]) -> None:
            pass

    fit(
        Line(), ROWS, collate, params(), section="sft", **SHAPE, loss=squared, seed=0,
            precision="fp32",
        log=lambda _, metrics: logged.append(metrics), progress=lambda *_: None, stats=Asked(),
    )  # fmt: skip
    assert [metrics["sft/asked"] for metrics in logged] == [1, 2]
    assert set(logged[0]) - PERF == {
        "sft/loss", "sft/grad_norm", "sft/lr", "sft/epoch", "sft/asked"
    }  # fmt: skip


def test_progress_counts_rows_and_ends_at_their_total() -> None:
    _, _, done = run(params(epochs=2), ROWS[:7])
    assert all(total == 14 for _, total in done)
    counts = [count for count, _ in done]
    assert counts == sorted(counts)
    assert counts[-1] == 14


def test_the_loss_is_the_mean_over_the_mini_batch() -> None:
    # At a rate that moves nothing, ten steps on all rows have the loss of the start.
    settings = params(epochs=10, batch_size=8, learning_rate=1e-12)
    _, logged, _ = run(settings, ROWS)
    mean = math.fsum(row["y"] ** 2 for row in ROWS) / len(ROWS)
    assert logged[0][1]["sft/loss"] == pytest.approx(mean, rel=1e-5)


def test_gradients_are_clipped() -> None:
    # AdamW's first step is rate * g / (|g| + eps): a gradient as small as eps halves it.
    settings = params(epochs=1, batch_size=8, micro_batch_tokens=8, max_grad_norm=1e-5)
    model, _, _ = run(settings, ROWS)
    assert model.weight.item() == pytest.approx(0.05, rel=1e-2)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_during_the_warm_up(schedule: str) -> None:
    # 40 steps; the rate logged at step 10 is a quarter of the way through the warm-up.
    _, logged, _ = run(params(epochs=20, schedule=schedule, warmup_fraction=1.0), ROWS)
    assert 0.02 < logged[0][1]["sft/lr"] < 0.03


def test_the_learning_rate_decays() -> None:
    _, logged, _ = run(params(epochs=20, schedule="linear"), ROWS)
    rates = [metrics["sft/lr"] for _, metrics in logged]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01


def test_a_loss_that_is_not_finite_names_section_step_and_way_out() -> None:
    rows = [*ROWS, {"x": 1.0, "y": math.inf}]
    with pytest.raises(TrainingError) as caught:
        run(params(), rows)
    message = str(caught.value)
    assert "sft: the loss is inf at step 10" in message or "sft: the loss is nan" in message
    assert "lower sft.learning_rate" in message
    assert "plumbline data check" in message


@pytest.mark.parametrize("epochs", [1, 6])
def test_a_loss_that_is_not_finite_is_found_in_the_last_steps_too(epochs: int) -> None:
    # 2 steps in all, and 12, of which only the 10th logs.
    class Late(Line):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (math.nan if self.calls > 4 * epochs - 1 else 1.0)

    with pytest.raises(TrainingError, match="expected a finite loss"):
        fit(
            Late(), ROWS, collate, params(epochs=epochs), section="sft", **SHAPE, loss=squared,
            seed=0, precision="fp32", log=lambda *_: None, progress=lambda *_: None,
        )  # fmt: skip


def test_a_short_training_reports_its_loss() -> None:
    _, logged, _ = run(params(epochs=1), ROWS)
    assert logged
    assert math.isfinite(logged[-1][1]["sft/loss"])


def test_nothing_is_left_in_the_folder_or_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(params(), ROWS)
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""


# Precision and memory


class Matrix(Line):
    """y = weight * x as a matrix product, and remembers how wide it was."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        product = x.unsqueeze(1) @ self.weight.unsqueeze(1)
        self.widths.add(product.dtype)
        return product.squeeze(1)


@pytest.mark.parametrize(
    ("precision", "width"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_matrix_products_have_the_width_asked_for(precision: Any, width: torch.dtype) -> None:
    model = Matrix()
    seen: list[torch.dtype] = []
    model.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.dtype))
    fit(
        model, ROWS, collate, params(epochs=60), section="sft", **SHAPE, loss=squared, seed=0,
            precision=precision, log=lambda *_: None, progress=lambda *_: None,
    )  # fmt: skip
    assert model.widths == {width}
    assert set(seen) == {model.weight.dtype} == {torch.float32}
    # Narrow products still lead to the right weight, to more digits than bf16 has.
    assert model.weight.item() == pytest.approx(2, abs=0.02)
