"""Step register: the policy becomes a version of a registered model."""

from collections.abc import Mapping

from prefect import task

from plumbline.models.load import load_tokenizer
from plumbline.params.schema import RegistryParams
from plumbline.refs import EvaluationRef, ModelRef, RegistrationRef
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.registry import register_model

SCORES = {
    "eval/win_rate": "win rate over SFT by the reward model",
    "eval/gold_win_rate": "win rate over SFT by the gold scorer",
    "eval/judge_win_rate": "win rate over SFT by the judge",
    "eval/policy/score": "reward-model score",
    "eval/policy/gold": "gold score",
    "eval/policy/judge": "judge's score",
    "eval/policy/kl": "KL to SFT, nats a response",
}
"""What the registry's page says of a version, each with its interval."""

ORIGIN = ("plumbline.experiment", "data.rev", "data.digest", "git.commit", "git.dirty")
"""Tags of the pipeline's run that a version takes over: what it was made from."""


@task(name="register", **step_options)
def register(
    params: RegistryParams,
    max_new_tokens: int,
    policy: ModelRef,
    evaluation: EvaluationRef,
    run: tracking.PipelineRun,
) -> RegistrationRef:
    """Make a new version of the registered model; the flow lets the alias point to it."""
    with tracking.step_run(run, "register", params.model_dump()) as tracked:
        if params.merge_lora and model_store.is_adapter(policy):
            # Merged, any tool can load and serve it.
            policy = model_store.log_model(
                tracked,
                "text-generation",
                model_store.open_policy(tracking.open_uri(policy.uri)),
                load_tokenizer(model_store.tokenizer_folder(policy)),
                max_new_tokens=max_new_tokens,
                metrics={},
            )
        pipeline = tracking.tags_of(run.mlflow_run_id)
        origin = {name: pipeline[name] for name in ORIGIN if name in pipeline}
        tags = {
            "plumbline.run_id": run.mlflow_run_id,
            "plumbline.run_name": run.name,
            "plumbline.digest": policy.digest,
            **origin,
            **scores_as_tags(evaluation.metrics),
        }
        words = describe(run.name, origin, evaluation.metrics)
        version = register_model(params.name, policy, tags, words)
        return RegistrationRef(
            digest=policy.digest,
            uri=policy.uri,
            mlflow_run_id=tracked.run_id,
            seconds=tracked.seconds,
            name=params.name,
            version=version,
        )


def scores_as_tags(metrics: Mapping[str, float]) -> dict[str, str]:
    """The scores that a version is judged by, and the ends of their 95% intervals, as tags."""
    names = [f"{name}{end}" for name in SCORES for end in ("", "_low", "_high")]
    return {name.replace("/", "."): f"{metrics[name]:.4f}" for name in names if name in metrics}


def describe(run: str, origin: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """What a version is, in Markdown: the run that made it, its data and code, its scores."""
    commit, edited = origin.get("git.commit"), origin.get("git.dirty") == "true"
    code = f", code {commit[:12]}{' with edits' if edited else ''}" if commit else ""
    lines = [
        f"Made by the run {run} of {origin.get('plumbline.experiment', 'an experiment')} from the "
        f"data {origin.get('data.rev', 'of an unknown version')}{code}.",
        "",
    ]
    for name, label in SCORES.items():
        if name in metrics:
            ends = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
            known = None not in ends
            interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if known else ""
            lines.append(f"- {label}: {metrics[name]:.3f}{interval}")
    return "\n".join(lines)
