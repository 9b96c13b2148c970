"""SFT and reward model as Plumbline trains them."""

from collections.abc import Mapping

from benchmarks.speed.ours.models import (
    fresh_scalar_model,
    language_model,
    memory,
    synchronize,
)
from benchmarks.speed.worker import Result, Spec, rows_of, serve, timed
from plumbline.params.schema import RewardModelParams, SFTParams
from plumbline.training.device import training_device
from plumbline.training.perf import matmul_rate
from plumbline.training.precision import resolve_precision
from plumbline.training.reporting import Log, ignore_metrics, ignore_progress
from plumbline.training.reward_model import Row, train_reward_model
from plumbline.training.sft import train_sft

WARM_UP_ROWS = 4


def work(spec: Spec) -> Result:
    """Train on the rows once; say how long it took."""
    device = training_device()
    precision = resolve_precision(spec["precision"], device)
    content = rows_of(spec["model"])
    rows: list[Row] = content[spec["kind"]][: spec["rows_used"]]
    options = {
        "epochs": 1,
        "batch_size": spec["batch"],
        "micro_batch_tokens": spec["micro_batch_tokens"],
        "learning_rate": spec["learning_rate"],
        "schedule": "linear",
        "warmup_fraction": 0.0,
    }
    losses: list[tuple[int, float]] = []

    def note(step: int, metrics: Mapping[str, float]) -> None:
        losses.extend((step, value) for name, value in metrics.items() if name.endswith("/loss"))

    if spec["kind"] == "sft":
        model = language_model(spec["model"], device)
    else:
        model = fresh_scalar_model(spec["model"], device)

    def train(part: list[Row], log: Log) -> None:
        shared = {"pad_token_id": content["pad"], "seed": spec["seed"], "precision": precision}
        if spec["kind"] == "sft":
            train_sft(
                model, part, SFTParams(**options), log=log, progress=ignore_progress, **shared
            )
        else:
            train_reward_model(
                model, part, RewardModelParams(**options), log=log, progress=ignore_progress,
                **shared,
            )  # fmt: skip

    # The library measures the matrix products once a process, and would do it in the time that
    # counts.
    matmul_rate(device, precision)
    train(rows[:WARM_UP_ROWS], ignore_metrics)
    with timed() as clock:
        train(rows, note)
        synchronize()
    tokens = sum(map(tokens_of, rows))
    return {
        "kind": spec["kind"],
        "rows": len(rows),
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_s": tokens / clock.seconds,
        "rows_per_s": len(rows) / clock.seconds,
        "mean_loss": mean_over_steps(losses),
        "precision": precision,
        **memory(),
    }


def mean_over_steps(losses: list[tuple[int, float]]) -> float:
    """The mean of losses that were each logged as the mean since the last one."""
    total, before = 0.0, 0
    for step, loss in losses:
        total += loss * (step - before)
        before = step
    return total / before


def tokens_of(row: Row) -> int:
    """Real tokens that a row's sequences have, the prompt once for each of them."""
    prompts = 1 if "response" in row else 2
    return sum(map(len, row.values())) + (prompts - 1) * len(row["prompt"])


if __name__ == "__main__":
    serve(work)
