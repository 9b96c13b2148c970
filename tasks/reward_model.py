"""Step reward_model: a scalar head on the SFT model learns what people prefer."""

from typing import Literal

from prefect import task

from plumbline.data.halves import Half, take_half
from plumbline.data.rows import encode_rows, read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.plots import calibration_plot, score_histogram
from plumbline.evaluation.reward_model import measure_reward_model
from plumbline.models.load import load_tokenizer
from plumbline.models.scalar_head import scalar_model_from_lm
from plumbline.params.schema import RewardModelParams
from plumbline.refs import DataRef, ModelRef, SplitRef
from plumbline.training.device import training_device
from plumbline.training.memory import memory_advice
from plumbline.training.precision import autocast, resolve_precision
from plumbline.training.reward_model import Row, normalise_on, train_reward_model
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.checkpoints import step_checkpoints
from tasks.live import step_progress


@task(name="reward_model", **step_options)
def reward_model(
    step: Literal["reward_model", "judge"],
    params: RewardModelParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    half: Half | None,
    sft: ModelRef,
    preferences: SplitRef,
    ratings: SplitRef | None,
    demonstrations: DataRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Train on people's judgements, normalise on demonstrations, measure on held-out judgements.

    The judgements are one half of the training rows, or all of them. `step` names the metrics.
    """
    asked = {**params.model_dump(), "seed": seed, "precision": precision, "half": half}
    with (
        tracking.step_run(run, step, asked) as tracked,
        step_progress(tracked, "rows") as progress,
        memory_advice(step),
    ):
        tokenizer = load_tokenizer(model_store.tokenizer_folder(sft))
        encoder = ChatEncoder(tokenizer)
        judgements = ratings or preferences

        def encoded(ref: DataRef) -> list[Row]:
            return [*encode_rows(read_rows(tracking.open_uri(ref.uri)), encoder)]

        train, pairs, shown = map(encoded, (judgements.train, preferences.test, demonstrations))
        rated = encoded(ratings.test) if ratings else None
        if half is not None:
            train = take_half(train, half)
        tracked.dataset(
            "ratings" if ratings else "preferences", judgements.train.digest,
            judgements.train.uri, judgements.train.rows, "training",
        )  # fmt: skip
        device = training_device()
        resolved = resolve_precision(precision, device)
        tracked.tag({"precision": resolved})
        model = scalar_model_from_lm(model_store.model_folder(sft), seed).to(device)
        train_reward_model(
            model, train, params,
            pad_token_id=encoder.pad_token_id, seed=seed, precision=resolved,
            log=tracked.log, progress=progress, prefix=step,
            checkpoints=step_checkpoints(run, tracked),
        )  # fmt: skip
        with autocast(device, resolved):
            normalisation = normalise_on(
                model,
                [[*row["prompt"], *row["response"]] for row in shown],
                params,
                encoder.pad_token_id,
                prefix=step,
            )
            held_out = measure_reward_model(
                model, pairs, rated, normalisation,
                max_tokens=params.micro_batch_tokens, pad_token_id=encoder.pad_token_id,
                prefix=step,
            )  # fmt: skip
        rejected, chosen = held_out.pairs.rejected.tolist(), held_out.pairs.chosen.tolist()
        tracked.figure(
            f"{step}_scores",
            score_histogram(
                {"rejected": rejected, "chosen": chosen}, "Scores of held-out pairs", "score"
            ),
        )
        if held_out.calibration:
            pointwise = params.objective == "pointwise"
            tracked.figure(
                f"{step}_calibration",
                calibration_plot(
                    held_out.calibration,
                    f"Calibration of the {step.replace('_', ' ')}",
                    stated="P(good) = σ(score)" if pointwise else "confidence σ(|margin|)",
                    outcome="share rated good" if pointwise else "share ordered right",
                ),
            )
        return model_store.log_model(
            tracked,
            "text-classification",
            model,
            tokenizer,
            metrics={
                f"{step}/training_rows": float(len(train)),
                **normalisation.metrics,
                **held_out.metrics,
            },
        )
