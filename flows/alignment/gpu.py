"""One step at a time on the GPU, whichever runs the steps are of."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.concurrency.sync import concurrency

from flows.services.deploying import GPU_LIMIT
from flows.services.prefect_server import is_own
from plumbline.params.schema import StepName
from plumbline.training.device import training_device

LEASE_SECONDS = 60.0
"""How long a slot stays taken after the process that took it was killed."""
COMPUTING: set[StepName] = {"sft", "reward_model", "judge", "rl", "dpo", "evaluate"}
"""The steps that use the GPU where there is one."""


@contextmanager
def gpu_slot(step: StepName, fresh: bool) -> Iterator[None]:
    """Hold a slot of the limit `gpu` while a step computes on one; wait for it if need be.

    Not on the server of the runs: it frees no slot of a run that was killed, as that of `plumbline
    up` does, and the next would wait for ever.

    Args:
        step: that is to run.
        fresh: whether it computes, or comes from the cache.
    """
    if not fresh or step not in COMPUTING or is_own() or training_device().type != "cuda":
        yield
        return
    # What fails while this slot is renewed must not end a training of hours. That of a deployment's
    # run limit is the engine's to renew, and there it does (ADR 0016).
    with concurrency(GPU_LIMIT, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False):
        yield
