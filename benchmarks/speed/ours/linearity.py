"""Whether time grows in a straight line with what there is to do, all else being equal.

`episodes`  PPO's seconds for more and more episodes
`tokens`    PPO's seconds for as many responses that never end, longer and longer
`sft`       SFT's seconds for more and more tokens

Each size is a training of its own, in a random order, after one that does not count.
"""

import random

from benchmarks.speed.ours.models import Prompts, language_model, ppo_models
from benchmarks.speed.ours.ppo import setting_of, warm_up
from benchmarks.speed.ours.supervised import tokens_of
from benchmarks.speed.worker import Result, Spec, rows_of, serve, timed
from plumbline.params.schema import SFTParams
from plumbline.training.device import training_device
from plumbline.training.perf import matmul_rate
from plumbline.training.precision import resolve_precision
from plumbline.training.reporting import ignore_metrics, ignore_progress, ignore_warnings
from plumbline.training.rl import train_rl
from plumbline.training.sft import train_sft

Point = dict[str, float]
"""`units` of work, and the `seconds` they took."""


def work(spec: Spec) -> Result:
    """Measure each size of the series."""
    sizes = list(spec["sizes"])
    random.Random(spec["seed"]).shuffle(sizes)
    measure = sft_point if spec["series"] == "sft" else ppo_point
    measure(spec, min(sizes))
    points = [measure(spec, size) for size in sizes]
    return {"points": sorted(points, key=lambda point: point["units"])}


def ppo_point(spec: Spec, size: int) -> Point:
    """A training of so many episodes, or with responses of so many tokens."""
    device = training_device()
    prompts = Prompts.of(spec)
    if spec["series"] == "episodes":
        spec = spec | {"episodes": size}
    else:
        spec = spec | {"response_tokens": size}
        # Nothing ends a response, so that they are all as long as they may be.
        prompts.stop_token_ids = ()
    setting = setting_of(spec)
    models = ppo_models(spec["model"], device, setting.precision)
    warm_up(models, prompts, setting)
    tokens: list[float] = []
    with timed() as clock:
        train_rl(
            models, prompts.names, prompts.encoder(), setting, seed=spec["seed"],
            log=lambda _, metrics: tokens.append(
                metrics["perf/tokens_per_s"] / metrics["perf/episodes_per_s"] * spec["batch"]
            ),
            progress=ignore_progress, warn=ignore_warnings,
        )  # fmt: skip
    units = size if spec["series"] == "episodes" else sum(tokens)
    return {"units": units, "seconds": clock.seconds}


def sft_point(spec: Spec, size: int) -> Point:
    """A training on so many rows."""
    device = training_device()
    precision = resolve_precision(spec["precision"], device)
    content = rows_of(spec["model"])
    rows = content["sft"][:size]
    model = language_model(spec["model"], device)
    matmul_rate(device, precision)
    params = SFTParams(
        epochs=1, batch_size=spec["batch"], micro_batch_tokens=spec["micro_batch_tokens"],
        learning_rate=spec["learning_rate"],
    )  # fmt: skip
    with timed() as clock:
        train_sft(
            model, rows, params, pad_token_id=content["pad"], seed=0, precision=precision,
            log=ignore_metrics, progress=ignore_progress,
        )  # fmt: skip
    return {"units": sum(map(tokens_of, rows)), "seconds": clock.seconds}


if __name__ == "__main__":
    serve(work)
