"""Step evaluate: the policy against the SFT model on held-out prompts."""

import json

from prefect import task

from plumbline.data.rows import read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.compare import Sampling, answer, compare, sample_table
from plumbline.evaluation.plots import score_histogram
from plumbline.evaluation.scores import load_gold
from plumbline.models.load import load_lm, load_tokenizer
from plumbline.models.scalar_head import load_scalar_model
from plumbline.params.schema import EvaluateParams
from plumbline.refs import DataRef, EvaluationRef, ModelRef, file_digest
from plumbline.training.device import training_device
from tasks import tracking
from tasks.caching import step_options
from tasks.pictures import publish_image
from tasks.progress import progress_bar


@task(name="evaluate", **step_options)
def evaluate(
    params: EvaluateParams,
    seed: int,
    max_tokens: int,
    temperature: float,
    sft: ModelRef,
    reward_model: ModelRef,
    policy: ModelRef,
    prompts: DataRef,
    run: tracking.PipelineRun,
) -> EvaluationRef:
    """Let both models answer the held-out prompts, score the answers, and compare."""
    with (
        tracking.step_run(run, "evaluate", {**params.model_dump(), "seed": seed}) as tracked,
        progress_bar("evaluate", "answers") as progress,
    ):
        encoder = ChatEncoder(load_tokenizer(tracking.tokenizer_folder(sft)))
        held_out = read_rows(tracking.open_uri(prompts.uri))["prompt"][: params.max_prompts]
        tracked.dataset("prompts", prompts.digest, prompts.uri, prompts.rows, "evaluation")
        device = training_device()
        ref_policy = load_lm(tracking.model_folder(sft)).to(device).eval()
        scorer = load_scalar_model(tracking.model_folder(reward_model)).to(device).eval()
        trained = load_lm(tracking.model_folder(policy)).to(device).eval()
        gold = load_gold(params.gold) if params.gold else None
        sft_answers, policy_answers = (
            answer(
                model,
                ref_policy,
                scorer,
                encoder,
                held_out,
                Sampling(max_tokens, temperature, seed),
                params,
                gold,
                progress,
            )
            for model in (ref_policy, trained)
        )
        metrics = compare(sft_answers, policy_answers, params, seed)
        tracked.finals(metrics)
        rows = sample_table(held_out, sft_answers, policy_answers, params.table_rows)
        for row in rows:
            row["prompt"] = json.loads(row["prompt"])[-1]["content"]
        tracked.table("samples", rows)
        publish_image(
            tracked,
            "scores",
            score_histogram(
                {"SFT": sft_answers.scores, "policy": policy_answers.scores},
                "Reward-model scores on held-out prompts",
                "score",
            ),
        )
        uri = tracked.figures["samples.json"]
        return EvaluationRef(
            digest=file_digest(tracking.open_uri(uri)),
            uri=uri,
            mlflow_run_id=tracked.run_id,
            metrics=metrics,
            figures=tracked.figures,
            seconds=tracked.seconds,
        )
