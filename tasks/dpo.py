"""Step dpo: the policy learns from the preferences, without a reward model."""

from collections.abc import Mapping
from typing import Literal

from prefect import task

from plumbline.data.rows import encode_rows, read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.plots import dpo_curves
from plumbline.models.load import load_lm, load_tokenizer
from plumbline.params.schema import DPOParams
from plumbline.refs import ModelRef, SplitRef
from plumbline.training.device import training_device
from plumbline.training.dpo import held_out_metrics, pair_logprobs, train_dpo
from plumbline.training.lora import add_adapter
from plumbline.training.memory import memory_advice
from plumbline.training.precision import autocast, resolve_precision
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.checkpoints import step_checkpoints
from tasks.live import step_progress
from tasks.pictures import publish_image


@task(name="dpo", **step_options)
def dpo(
    params: DPOParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    max_new_tokens: int,
    sft: ModelRef,
    preferences: SplitRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Train the policy by DPO, with the SFT model as its reference."""
    asked = {**params.model_dump(), "seed": seed, "precision": precision}
    with (
        tracking.step_run(run, "dpo", asked) as tracked,
        step_progress(tracked, "pairs") as progress,
        memory_advice("dpo"),
    ):
        tokenizer = load_tokenizer(model_store.tokenizer_folder(sft))
        encoder = ChatEncoder(tokenizer)
        train, test = (
            encode_rows(read_rows(tracking.open_uri(split.uri)), encoder)
            for split in (preferences.train, preferences.test)
        )
        tracked.dataset(
            "preferences", preferences.train.digest, preferences.train.uri,
            preferences.train.rows, "training",
        )  # fmt: skip
        device = training_device()
        resolved = resolve_precision(precision, device)
        tracked.tag({"precision": resolved})
        pad, tokens = encoder.pad_token_id, params.micro_batch_tokens
        policy = load_lm(model_store.model_folder(sft)).to(device).eval()
        # The policy is still the reference: no second model is needed.
        with autocast(device, resolved):
            reference, held_out_reference = (
                pair_logprobs(policy, part, tokens, pad) for part in (train, test)
            )
        if params.lora.enabled:
            add_adapter(policy, params.lora, seed)
        history: list[dict[str, float]] = []

        def log(step: int, metrics: Mapping[str, float]) -> None:
            history.append({"step": step, **metrics})
            tracked.log(step, metrics)

        train_dpo(
            policy, train, reference, params,
            pad_token_id=pad, seed=seed, precision=resolved, log=log, progress=progress,
            checkpoints=step_checkpoints(run, tracked),
        )  # fmt: skip
        with autocast(device, resolved):
            metrics = held_out_metrics(policy, test, held_out_reference, params, pad)
        tracked.json("history", history)
        publish_image(
            tracked, "curves", dpo_curves(history, f"{run.name}: DPO, beta {params.beta:g}")
        )
        return model_store.log_policy(
            tracked,
            policy,
            tokenizer,
            base=sft if params.lora.enabled else None,
            max_new_tokens=max_new_tokens,
            metrics=metrics,
        )
