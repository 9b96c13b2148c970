"""Step contest: two registered versions answer the same held-out prompts, one scorer for both."""

from typing import Literal

from prefect import task
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.compare import Sampling
from plumbline.evaluation.contest import (
    BatchScorer,
    Judged,
    answer_table,
    contest_metrics,
    model_scorer,
    play,
    text_scorer,
)
from plumbline.evaluation.plots import score_histogram
from plumbline.functions import load_function
from plumbline.models.load import load_tokenizer
from plumbline.params.schema import EvaluateParams, SamplingParams
from plumbline.refs import DataRef, EvaluationRef, ModelRef, file_digest, folder_digest
from plumbline.training.device import training_device
from plumbline.training.memory import memory_advice
from plumbline.training.precision import autocast, resolve_precision
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.held_out import open_scorer, publish_answers, read_prompts
from tasks.live import step_progress
from tasks.pictures import publish_image


@task(name="contest", **step_options)
def contest(
    params: EvaluateParams,
    sampling: SamplingParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    champion: ModelRef,
    challenger: ModelRef,
    scorer: ModelRef | None,
    prompts: DataRef,
    run: tracking.PipelineRun,
) -> EvaluationRef:
    """Let both answer, score the answers, and compare; without `scorer` the gold scorer does."""
    asked = {**params.model_dump(), **sampling.model_dump(), "seed": seed, "precision": precision}
    with (
        tracking.step_run(run, "contest", asked) as tracked,
        step_progress(tracked, "answers") as progress,
    ):
        held_out = read_prompts(tracked, prompts, params)
        device = training_device()
        judge = open_scorer(scorer, device) if scorer else None
        drawn = Sampling(sampling.response_tokens, sampling.temperature, seed)

        def judged(player: ModelRef, before: int) -> Judged:
            # One at a time: two large models need not fit beside each other.
            model = model_store.open_policy(tracking.open_uri(player.uri)).to(device).eval()
            encoder = ChatEncoder(load_tokenizer(model_store.tokenizer_folder(player)))
            score = _scorer(params, scorer, judge, player)
            return play(
                model, encoder, held_out, drawn, params.batch_size, score,
                lambda done, total: progress(before + done, 2 * total),
            )  # fmt: skip

        ways = [f"lower evaluate.batch_size, which is {params.batch_size}"]
        with (
            memory_advice("contest", ways if params.batch_size > 1 else []),
            autocast(device, resolve_precision(precision, device)),
        ):
            ours, theirs = judged(challenger, 0), judged(champion, len(held_out))
        metrics = contest_metrics(theirs, ours, params.bootstrap_samples, seed)
        tracked.finals(metrics)
        publish_answers(tracked, answer_table(held_out, theirs, ours, params.table_rows))
        publish_image(
            tracked,
            "contest",
            score_histogram(
                {"champion": theirs.scores, "challenger": ours.scores},
                "Scores of both on the same held-out prompts",
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
            figure_digests=tracked.figure_digests,
            seconds=tracked.seconds,
        )


def _scorer(
    params: EvaluateParams, scorer: ModelRef | None, judge: PreTrainedModel | None, player: ModelRef
) -> BatchScorer:
    """What scores a player's answers."""
    if scorer is None or judge is None:
        assert params.gold is not None
        return text_scorer(load_function(params.gold, "evaluate.gold"))
    folders = [model_store.tokenizer_folder(one) for one in (scorer, player)]
    ours, theirs = (folder_digest(folder) for folder in folders)
    encoder = ChatEncoder(load_tokenizer(folders[0]))
    return model_scorer(judge, encoder, same_tokens=ours == theirs)
