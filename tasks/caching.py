"""How Prefect finds a step's earlier result: by what it depends on, and nothing else."""

from dataclasses import dataclass
from typing import Any, cast

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from tasks.faults import RETRY_DELAYS, can_retry
from tasks.keys import Cached, cache_key, ingredients

NOT_IN_THE_KEY = ("run",)
"""Arguments of a task that can't change its result."""


@dataclass
class StepCache(CachePolicy):
    """Key of a step: its params, the digests of its inputs, and the code it reaches."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        step = cast(Cached, task_ctx.task.name)
        arguments = {k: v for k, v in inputs.items() if k not in NOT_IN_THE_KEY}
        return cache_key(step, ingredients(step, arguments))


step_options: dict[str, Any] = {
    "cache_policy": StepCache(),
    "persist_result": True,
    "result_serializer": "json",
    "retries": len(RETRY_DELAYS),
    "retry_delay_seconds": [*RETRY_DELAYS],
    "retry_condition_fn": can_retry,
}
"""Options of every step's task."""
