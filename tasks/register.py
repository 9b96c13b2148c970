"""Step register: the policy becomes a version of a registered model."""

from prefect import task

from plumbline.models.load import load_tokenizer
from plumbline.params.schema import RegistryParams
from plumbline.refs import EvaluationRef, ModelRef, RegistrationRef
from tasks import model_store, tracking
from tasks.caching import step_options

SCORES = (
    "eval/win_rate",
    "eval/policy/score",
    "eval/policy/kl",
    "eval/policy/gold",
    "eval/policy/judge",
)
"""What the registry's page says of a version."""

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
        scores = {
            name.replace("/", "."): f"{evaluation.metrics[name]:.4f}"
            for name in SCORES
            if name in evaluation.metrics
        }
        pipeline = tracking.tags_of(run.mlflow_run_id)
        tags = {
            "plumbline.run_id": run.mlflow_run_id,
            "plumbline.digest": policy.digest,
            **{name: pipeline[name] for name in ORIGIN if name in pipeline},
            **scores,
        }
        version = model_store.register_model(params.name, policy, tags)
        return RegistrationRef(
            digest=policy.digest,
            uri=policy.uri,
            mlflow_run_id=tracked.run_id,
            seconds=tracked.seconds,
            name=params.name,
            version=version,
        )
