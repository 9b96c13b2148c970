"""Step reward_model: a scalar head on the SFT model learns the preferences."""

from prefect import task

from plumbline.data.rows import encode_rows, read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.plots import score_histogram
from plumbline.evaluation.scores import calibration_error, correlation, wilson_interval
from plumbline.models.load import load_tokenizer
from plumbline.models.scalar_head import scalar_model_from_lm
from plumbline.params.schema import RewardModelParams
from plumbline.refs import DataRef, ModelRef, SplitRef
from plumbline.training.device import training_device
from plumbline.training.reward_model import normalise_on, score_pairs, train_reward_model
from tasks import tracking
from tasks.caching import step_options
from tasks.progress import progress_bar


@task(name="reward_model", **step_options)
def reward_model(
    params: RewardModelParams,
    seed: int,
    sft: ModelRef,
    preferences: SplitRef,
    demonstrations: DataRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Train on pairs, normalise on demonstrations, judge on held-out pairs."""
    with (
        tracking.step_run(run, "reward_model", {**params.model_dump(), "seed": seed}) as tracked,
        progress_bar("reward_model", "pairs") as progress,
    ):
        tokenizer = load_tokenizer(tracking.tokenizer_folder(sft))
        encoder = ChatEncoder(tokenizer)
        train, test, shown = (
            encode_rows(read_rows(tracking.open_uri(ref.uri)), encoder)
            for ref in (preferences.train, preferences.test, demonstrations)
        )
        tracked.dataset(
            "preferences", preferences.train.digest, preferences.train.uri,
            preferences.train.rows, "training",
        )  # fmt: skip
        model = scalar_model_from_lm(tracking.model_folder(sft), seed).to(training_device())
        train_reward_model(
            model, train, params,
            pad_token_id=encoder.pad_token_id, seed=seed, log=tracked.log, progress=progress,
        )  # fmt: skip
        metrics = normalise_on(
            model,
            [[*row["prompt"], *row["response"]] for row in shown],
            params,
            encoder.pad_token_id,
        )

        scores = score_pairs(model, test, params.micro_batch_size, encoder.pad_token_id)
        margins = (scores.chosen - scores.rejected).tolist()
        # A label that is known to be wrong says nothing about the model.
        clean = [m for m, row in zip(margins, test, strict=True) if row.get("clean", True)]
        accuracy = wilson_interval(sum(margin > 0 for margin in clean), len(clean))
        lengths = [len(row[side]) for side in ("chosen", "rejected") for row in test]
        metrics |= {
            "reward_model/accuracy": accuracy.mean,
            "reward_model/accuracy_low": accuracy.low,
            "reward_model/accuracy_high": accuracy.high,
            "reward_model/accuracy_all_labels": sum(m > 0 for m in margins) / len(margins),
            "reward_model/margin_mean": sum(clean) / len(clean),
            "reward_model/calibration_error": calibration_error(clean),
            "reward_model/score_length_correlation": correlation(
                [*scores.chosen.tolist(), *scores.rejected.tolist()], lengths
            ),
        }
        tracked.figure(
            "reward_model_scores",
            score_histogram(
                {"rejected": scores.rejected.tolist(), "chosen": scores.chosen.tolist()},
                "Reward-model scores of held-out pairs",
                "score",
            ),
        )
        return tracked.model("text-classification", model, tokenizer, metrics=metrics)
