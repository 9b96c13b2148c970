"""Step judge: a second reward model from the other half of the judgements, to check the first."""

from typing import Literal

from prefect import task

from plumbline.params.schema import RewardModelParams
from plumbline.refs import DataRef, ModelRef, SplitRef
from tasks import tracking
from tasks.caching import step_options
from tasks.reward_model import make_reward_model


@task(name="judge", **step_options)
def judge(
    params: RewardModelParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    half: Literal[0, 1] | None,
    sft: ModelRef,
    preferences: SplitRef,
    ratings: SplitRef | None,
    demonstrations: DataRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Train the judge, which no training follows."""
    return make_reward_model(
        "judge", params, precision, seed, half, sft, preferences, ratings, demonstrations, run
    )
