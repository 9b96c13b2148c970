"""Step rl: the policy learns from the reward model."""

from collections.abc import Mapping

from prefect import task

from plumbline.data.rows import read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.plots import curves, reward_against_kl
from plumbline.models.load import load_lm, load_tokenizer
from plumbline.models.scalar_head import load_scalar_model
from plumbline.params.schema import RLParams
from plumbline.refs import DataRef, ModelRef
from plumbline.training.device import training_device
from plumbline.training.rl import Models, Tokens, train_rl
from tasks import tracking
from tasks.caching import step_options
from tasks.pictures import publish_image
from tasks.progress import progress_bar

FINAL_ROLLOUTS = 5
"""The step's final metrics are means over so many rollouts, for one alone is noisy."""


@task(name="rl", **step_options)
def rl(
    params: RLParams,
    seed: int,
    sft: ModelRef,
    reward_model: ModelRef,
    prompts: DataRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Train the policy by RL, with the SFT model as its reference."""
    with (
        tracking.step_run(run, "rl", {**params.model_dump(), "seed": seed}) as tracked,
        progress_bar("rl", "episodes") as progress,
    ):
        tokenizer = load_tokenizer(tracking.tokenizer_folder(sft))
        encoder = ChatEncoder(tokenizer)
        queries = encoder.prompts(read_rows(tracking.open_uri(prompts.uri))["prompt"])
        tracked.dataset("prompts", prompts.digest, prompts.uri, prompts.rows, "training")
        device = training_device()
        policy, ref_policy = (load_lm(tracking.model_folder(sft)).to(device) for _ in range(2))
        scorer, critic = (
            load_scalar_model(tracking.model_folder(reward_model)).to(device) for _ in range(2)
        )
        history: list[dict[str, float]] = []

        def log(step: int, metrics: Mapping[str, float]) -> None:
            history.append(dict(metrics))
            tracked.log(step, metrics)

        train_rl(
            Models(policy.eval(), ref_policy.eval(), scorer.eval(), critic.eval()),
            queries,
            params,
            tokens=Tokens(encoder.eos_token_id, encoder.pad_token_id),
            seed=seed,
            log=log,
            progress=progress,
        )
        tracked.json("history", history)
        title = f"{run.name}: {params.algorithm}, kl_coef {params.kl_coef:g}"
        publish_image(tracked, "curves", curves(history, title))
        publish_image(
            tracked,
            "reward-kl",
            reward_against_kl(history, "Reward against distance from the SFT model"),
        )
        last = history[-FINAL_ROLLOUTS:]
        return tracked.model(
            "text-generation",
            policy,
            tokenizer,
            max_new_tokens=params.response_tokens,
            metrics={
                f"rl/{name}": sum(row[name] for row in last) / len(last)
                for name in history[0]
                if name.startswith(("objective/", "response/", "policy/", "val/explained", "perf/"))
            },
        )
