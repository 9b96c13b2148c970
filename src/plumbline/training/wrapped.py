"""A model inside a module whose forward computes what a loss needs."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Wrapped(nn.Module):
    """Passes on what the Trainer asks of a model besides its forward, which subclasses define.

    The loss then starts from the output of a forward, so that what the Trainer puts around a
    forward (autocast, processes that share the work) goes around the whole computation.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the model's activations in the backward pass."""
        self.model.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The name that transformers before 5.23 calls."""
        self.model.gradient_checkpointing_enable(**options)
