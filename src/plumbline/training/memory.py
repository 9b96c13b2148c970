"""Taking less memory, giving it back, and what to do when a GPU's is full."""

import ctypes
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from plumbline.errors import TrainingError

# On a CPU torch keeps what it made for each shape of a product, up to 1,024 of them in two caches:
# responses end when they like, and a process of 0.6 GB grew by 60 MB a rollout. With sizes rounded
# (plumbline.ops.shapes) 32 are as fast. Read at the first product; what a user has set stays.
# Large tensors are cheaper to get in huge pages, for which Linux wants to be asked.
for _name, _value in (
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32"),
    ("LRU_CACHE_CAPACITY", "1"),
    ("THP_MEM_ALLOC_ENABLE", "1"),
):
    os.environ.setdefault(_name, _value)


def release_memory() -> None:
    """Give back what a finished training or evaluation has left, so that the next has room.

    Trainers and their models refer to each other, and stay until the garbage collector comes by;
    the C library and the GPU's allocator keep what was freed for themselves.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Let the C library give back what was freed, which it would keep in pieces.

    Sampling and updating need pieces of other sizes: what the one has left does not serve the
    other, and the process would hold room for both.
    """
    # Of glibc alone; other C libraries give memory back by themselves.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def checkpointing(*networks: nn.Module) -> Iterator[None]:
    """Recompute activations in the backward pass, in all transformers inside `networks`."""
    transformers = [
        module
        for network in networks
        for module in network.modules()
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing
    ]
    modes = [transformer.training for transformer in transformers]
    for transformer in transformers:
        transformer.activation_checkpointing_enable({"use_reentrant": False})
        # It acts in training mode only; dropout is off either way.
        transformer.train()
    try:
        yield
    finally:
        for transformer, mode in zip(transformers, modes, strict=True):
            transformer.activation_checkpointing_disable()
            # Enabling hooks into the embeddings, and disabling forgets about it without adapters.
            transformer.disable_input_require_grads()
            transformer.train(mode)


def training_ways(
    section: str, micro_batch_tokens: int, longest: int, gradient_checkpointing: bool
) -> Iterator[str]:
    """Ways to let a training take less memory, given what is set in its section of the params.

    Args:
        section: of the params.
        micro_batch_tokens, gradient_checkpointing: as set.
        longest: tokens of the longest row, which is never split.
    """
    if micro_batch_tokens > longest:
        yield (
            f"lower {section}.micro_batch_tokens, which is {micro_batch_tokens} (the longest row "
            f"has {longest}): the gradients stay those of the whole mini-batch"
        )
    if not gradient_checkpointing:
        yield f"set {section}.gradient_checkpointing to true"


@contextmanager
def memory_advice(section: str, ways: Iterable[str] = ()) -> Iterator[None]:
    """Turn a full GPU memory inside the context into an error that names the fields to change.

    Args:
        section: of the params.
        ways: to take less memory, each an imperative.

    Raises:
        TrainingError: the memory was full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = [*ways, "free the GPU of other processes, or take a smaller model"]
        raise TrainingError(
            f"{section}: the GPU's memory is full ({str(error).partition(chr(10))[0]}). To go on: "
            + "; or ".join(advice)
        ) from error
