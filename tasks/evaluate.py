"""Step evaluate: the policy against the SFT model on held-out prompts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prefect import task

from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.best_of_n import BestOf, best_of_n_curve, best_of_n_metrics
from plumbline.evaluation.compare import (
    Sampling,
    answer,
    answer_repeatedly,
    compare,
    sample_table,
)
from plumbline.evaluation.plots import score_histogram
from plumbline.evaluation.reward_kl import reward_against_kl
from plumbline.functions import load_function
from plumbline.models.load import load_lm, load_tokenizer
from plumbline.params.schema import EvaluateParams, SamplingParams, reward_name
from plumbline.refs import DataRef, EvaluationRef, ModelRef
from plumbline.training.device import training_device
from plumbline.training.memory import memory_advice
from plumbline.training.precision import autocast, resolve_precision
from plumbline.training.reporting import Progress
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.held_out import open_scorer, publish_answers, read_prompts
from tasks.live import step_progress
from tasks.pictures import publish_image


@task(name="evaluate", **step_options)
def evaluate(
    params: EvaluateParams,
    sampling: SamplingParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    sft: ModelRef,
    reward_model: ModelRef,
    judge: ModelRef | None,
    policy: ModelRef,
    prompts: DataRef,
    run: tracking.PipelineRun,
) -> EvaluationRef:
    """Let both models answer the held-out prompts, score the answers, and compare."""
    asked = {**params.model_dump(), **sampling.model_dump(), "seed": seed, "precision": precision}
    with (
        tracking.step_run(run, "evaluate", asked) as tracked,
        step_progress(tracked, "answers") as progress,
        memory_advice("evaluate", ["set evaluate.judge to false"] if judge else []),
    ):
        encoder = ChatEncoder(load_tokenizer(model_store.tokenizer_folder(sft)))
        held_out = read_prompts(tracked, prompts, params)
        device = training_device()
        reference = load_lm(model_store.model_folder(sft)).to(device).eval()
        trained = model_store.open_policy(tracking.open_uri(policy.uri)).to(device).eval()
        scorer = open_scorer(reward_model, device)
        onlooker = open_scorer(judge, device) if judge else None
        gold = load_function(params.gold, "evaluate.gold") if params.gold else None
        drawn = Sampling(sampling.response_tokens, sampling.temperature, seed)
        answers = len(held_out) * (2 + (params.best_of_n if params.best_of_n > 1 else 0))

        def after(before: int) -> Progress:
            """What counts the answers of one of the three parts after those before."""
            return lambda done, total: progress(before + done, answers)

        ways = [f"lower evaluate.batch_size, which is {params.batch_size}"]
        with (
            memory_advice("evaluate", ways if params.batch_size > 1 else []),
            autocast(device, resolve_precision(precision, device)),
        ):
            sft_answers, policy_answers = (
                answer(
                    model, reference, scorer, encoder, held_out, drawn, params, gold,
                    after(part * len(held_out)), onlooker,
                )
                for part, model in enumerate((reference, trained))
            )  # fmt: skip
            curve: list[BestOf] = []
            if params.best_of_n > 1:
                repeated = answer_repeatedly(
                    reference, scorer, encoder, held_out, params.best_of_n, drawn, params, gold,
                    after(2 * len(held_out)), onlooker,
                )  # fmt: skip
                curve = best_of_n_curve(
                    repeated.scores,
                    gold=repeated.gold,
                    judge=repeated.judge,
                    bootstrap_samples=params.bootstrap_samples,
                    seed=seed,
                )
        metrics = compare(sft_answers, policy_answers, params, seed) | best_of_n_metrics(curve)
        tracked.finals(metrics)
        table = sample_table(held_out, sft_answers, policy_answers, params.table_rows)
        rows = publish_answers(tracked, table)
        publish_image(
            tracked,
            "scores",
            score_histogram(
                {"SFT": sft_answers.scores, "policy": policy_answers.scores},
                "Reward-model scores on held-out prompts",
                "score",
            ),
        )
        publish_image(
            tracked,
            "reward-kl",
            reward_against_kl(
                training_history(policy),
                "Reward against the distance from the SFT model",
                best_of_n=curve,
                held_out=metrics,
                gold_curve=f"objective/reward_{reward_name(params.gold)}" if params.gold else "",
            ),
        )
        return EvaluationRef(
            digest=_digest(rows, metrics),
            uri=tracked.figures["samples.json"],
            mlflow_run_id=tracked.run_id,
            metrics=metrics,
            figures=tracked.figures,
            figure_digests=tracked.figure_digests,
            seconds=tracked.seconds,
        )


def _digest(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    """Of all that a later step reads: the metrics stand in the registry."""
    text = json.dumps([rows, metrics], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def training_history(policy: ModelRef) -> list[dict[str, float]]:
    """The curves of the policy's training by RL; empty where it came about otherwise."""
    rows: list[dict[str, float]] = json.loads(
        tracking.open_uri(policy.figures["history.json"]).read_bytes()
    )
    return [row for row in rows if "objective/kl" in row]
