"""What to do when a GPU's memory is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plumbline.errors import TrainingError


@contextmanager
def memory_advice(
    section: str, micro_batch_size: int, gradient_checkpointing: bool
) -> Iterator[None]:
    """Turn a full GPU memory inside the context into an error that names the fields to change.

    Args:
        section: of the params.
        micro_batch_size, gradient_checkpointing: as they are in that section.

    Raises:
        TrainingError: the memory was full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = []
        if micro_batch_size > 1:
            ways.append(
                f"lower {section}.micro_batch_size, which is {micro_batch_size}: the gradients "
                "stay those of the whole mini-batch"
            )
        if not gradient_checkpointing:
            ways.append(f"set {section}.gradient_checkpointing to true")
        ways.append("free the GPU of other processes, or take a smaller model")
        raise TrainingError(
            f"{section}: the GPU's memory is full ({str(error).partition(chr(10))[0]}). To go on: "
            + "; or ".join(ways)
        ) from error
