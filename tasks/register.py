"""Step register: the policy becomes a version of a registered model."""

from prefect import task

from plumbline.params.schema import RegistryParams
from plumbline.refs import EvaluationRef, ModelRef, RegistrationRef
from tasks import tracking
from tasks.caching import step_options


@task(name="register", **step_options)
def register(
    params: RegistryParams, policy: ModelRef, evaluation: EvaluationRef, run: tracking.PipelineRun
) -> RegistrationRef:
    """Make a new version of the registered model; the flow lets the alias point to it."""
    with tracking.step_run(run, "register", params.model_dump()) as tracked:
        tags = {
            "plumbline.run_id": run.mlflow_run_id,
            "plumbline.digest": policy.digest,
            **{
                name.replace("/", "."): f"{value:.4f}"
                for name, value in evaluation.metrics.items()
                if name
                in ("eval/win_rate", "eval/policy/score", "eval/policy/kl", "eval/policy/gold")
            },
        }
        version = tracking.register_model(params.name, policy, tags)
        return RegistrationRef(
            digest=policy.digest,
            uri=policy.uri,
            mlflow_run_id=tracked.run_id,
            seconds=tracked.seconds,
            name=params.name,
            version=version,
        )
