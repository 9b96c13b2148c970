"""What the phases of an RL rollout compute."""

from collections.abc import Sequence

from torch import nn

from plumbline.models.packed_attention import take_packed
from plumbline.rollout.experience import Sequences
from plumbline.rollout.generate import Responses
from plumbline.training.models import Models, ValueHead
from plumbline.training.perf import Cost, Work


def sampling_work(
    policy: nn.Module, queries: Sequence[Sequence[int]], responses: Responses
) -> Work:
    """Reading each different query once, and all tokens of the responses but their last ones."""
    read = [len(query) for query in {tuple(query) for query in queries}]
    said = responses.mask.sum(1).tolist()
    whole = [len(query) + tokens - 1 for query, tokens in zip(queries, said, strict=True)]
    cost = Cost.of(policy)
    repeated = cost.forward([*map(len, queries)], 0) - cost.forward(read, 0)
    return Work(
        sum(read) + sum(said) - len(said),
        responses.computed,
        cost.forward(whole, sum(said)) - repeated,
    )


def scoring_work(models: Models, sequences: Sequences, max_tokens: int) -> Work:
    """A forward pass of each model over all sequences."""
    lengths, predicting = _tokens(sequences)
    policy = Cost.of(models.policy).forward(lengths, predicting)
    others = [models.reward_model, models.judge, models.critic]
    readers = [model for model in others if model is not None and not isinstance(model, ValueHead)]
    # The reference costs what the policy does, which it may be.
    flops = 2 * policy + sum(Cost.of(model).forward(lengths, 0) for model in readers)
    return _times(2 + len(readers), sequences, max_tokens, models, flops)


def update_work(models: Models, sequences: Sequences, max_tokens: int) -> Work:
    """A forward and a backward pass of what is trained over a mini-batch."""
    lengths, predicting = _tokens(sequences)
    flops = Cost.of(models.policy).training(lengths, predicting)
    networks = 1
    if models.critic is not None and not isinstance(models.critic, ValueHead):
        flops += Cost.of(models.critic).training(lengths, 0)
        networks = 2
    return _times(networks, sequences, max_tokens, models, flops)


def _times(
    passes: int, sequences: Sequences, max_tokens: int, models: Models, flops: float
) -> Work:
    packed = take_packed(models.policy)
    lengths, _ = _tokens(sequences)
    computed = sum(lengths)
    if not packed:
        groups = sequences.micro_batches(max_tokens, packed=False)
        computed = sum(sequences.rows(group).ids.numel() for group in groups)
    return Work(passes * sum(lengths), passes * computed, flops)


def _tokens(sequences: Sequences) -> tuple[list[int], int]:
    return sequences.mask.sum(1).tolist(), int(sequences.response_mask.sum())
