"""The models of a reinforcement-learning run, and which of them plays which part."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.training.lora import adapter_off


class ValueHead(nn.Module):
    """A critic that shares the policy's trunk: one linear layer on its last hidden state."""

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            std = 1 / math.sqrt(hidden_size + 1)
            self.linear.weight.copy_(torch.randn(1, hidden_size, generator=generator) * std)
            self.linear.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [N] of hidden states [N, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)
        return values


class Models(NamedTuple):
    """The models of RL, on one device; only policy and critic are trained."""

    policy: PreTrainedModel
    ref_policy: PreTrainedModel | None
    """None: the policy with its adapter off."""
    reward_model: PreTrainedModel
    critic: PreTrainedModel | ValueHead | None
    """A scalar model, a head on the policy's trunk, or none where the algorithm needs none."""
    judge: PreTrainedModel | None = None
    """A second reward model that only looks on."""

    @property
    def trained(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The trainable weights by the prefix of their metrics.

        Each network has its own scale of gradients: one norm over both would let the critic's
        early errors shrink the policy's steps. A shared trunk has one.
        """
        policy = _trainable(self.policy)
        if self.critic is None:
            return [("policy", policy)]
        if isinstance(self.critic, ValueHead):
            return [("policy", policy + _trainable(self.critic))]
        return [("policy", policy), ("val", _trainable(self.critic))]

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The reference, which is the policy itself where an adapter makes the difference."""
        return adapter_off(self.policy) if self.ref_policy is None else nullcontext(self.ref_policy)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
