"""Step rl: the policy learns from the reward model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from prefect import task
from transformers import PreTrainedModel

from plumbline.data.rows import read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.plots import curves
from plumbline.models.load import load_lm, load_tokenizer
from plumbline.models.scalar_head import load_scalar_model
from plumbline.params.schema import RLParams, SamplingParams
from plumbline.refs import DataRef, ModelRef
from plumbline.training.device import training_device
from plumbline.training.lora import add_adapter
from plumbline.training.memory import memory_advice
from plumbline.training.models import Models, ValueHead
from plumbline.training.policy_update import Setting
from plumbline.training.precision import Precision, hold_narrow, resolve_precision
from plumbline.training.rl import train_rl
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.checkpoints import step_checkpoints
from tasks.live import step_progress
from tasks.pictures import publish_image

FINAL_ROLLOUTS = 5
"""The step's final metrics are means over so many rollouts, for one alone is noisy."""
FINAL = ("objective/", "response/", "policy/", "val/explained", "perf/")
"""The curves that final metrics are made of."""


@task(name="rl", **step_options)
def rl(
    params: RLParams,
    sampling: SamplingParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    sft: ModelRef,
    reward_model: ModelRef,
    judge: ModelRef | None,
    prompts: DataRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Train the policy by RL, with the SFT model as its reference."""
    asked = {**params.model_dump(), **sampling.model_dump(), "seed": seed, "precision": precision}
    with (
        tracking.step_run(run, "rl", asked) as tracked,
        step_progress(tracked, "episodes") as progress,
        memory_advice("rl", smaller_models(params, judge is not None)),
    ):
        tokenizer = load_tokenizer(model_store.tokenizer_folder(sft))
        encoder = ChatEncoder(tokenizer)
        tracked.dataset("prompts", prompts.digest, prompts.uri, prompts.rows, "training")
        device = training_device()
        resolved = resolve_precision(precision, device)
        tracked.tag({"precision": resolved})
        models = load_models(
            params,
            model_store.model_folder(sft),
            model_store.model_folder(reward_model),
            model_store.model_folder(judge) if judge else None,
            device,
            seed,
            resolved,
        )
        history: list[dict[str, float]] = []

        def log(step: int, metrics: Mapping[str, float]) -> None:
            history.append(dict(metrics))
            tracked.log(step, metrics)

        train_rl(
            models,
            read_rows(tracking.open_uri(prompts.uri))["prompt"],
            encoder,
            Setting(params, sampling, resolved),
            seed=seed,
            log=log,
            progress=progress,
            warn=tracked.warn,
            checkpoints=step_checkpoints(run, tracked),
        )
        tracked.json("history", history)
        title = f"{run.name}: {params.algorithm}, kl_coef {params.kl_coef:g}"
        publish_image(tracked, "curves", curves(history, title))
        last = history[-FINAL_ROLLOUTS:]
        finals = {
            f"rl/{name}": sum(row[name] for row in last) / len(last)
            for name in history[0]
            if name.startswith(FINAL)
        }
        return model_store.log_policy(
            tracked,
            models.policy,
            tokenizer,
            base=sft if params.lora.enabled else None,
            max_new_tokens=sampling.response_tokens,
            metrics=finals | {"rl/warnings": float(tracked.warnings)},
        )


def smaller_models(params: RLParams, judge: bool) -> Iterator[str]:
    """Ways to hold fewer weights, given the params of the step and whether a judge looks on."""
    if not params.lora.enabled:
        yield "set rl.lora.enabled to true"
    if params.algorithm == "ppo" and params.critic != "shared":
        yield "set rl.critic to shared"
    if judge:
        yield "set evaluate.judge to false"


def load_models(
    params: RLParams,
    sft: Path,
    reward_model: Path,
    judge: Path | None,
    device: torch.device,
    seed: int,
    precision: Precision,
) -> Models:
    """Load what the algorithm needs from the folders of the earlier steps' models."""

    def frozen(model: PreTrainedModel) -> PreTrainedModel:
        return hold_narrow(model.to(device).eval(), precision)

    policy = load_lm(sft).to(device).eval()
    ref_policy = None if params.lora.enabled else frozen(load_lm(sft))
    if params.lora.enabled:
        add_adapter(policy, params.lora, seed)
    critic: PreTrainedModel | ValueHead | None = None
    if params.algorithm == "ppo" and params.critic == "shared":
        head = ValueHead(policy.get_output_embeddings().in_features, seed)
        critic = head.to(device)
    elif params.algorithm == "ppo":
        critic = load_scalar_model(reward_model).to(device).eval()
        if params.lora.enabled:
            add_adapter(critic, params.lora, seed)
    scorer = frozen(load_scalar_model(reward_model))
    onlooker = frozen(load_scalar_model(judge)) if judge else None
    return Models(policy, ref_policy, scorer, critic, onlooker)
