"""Which model plays which part, and the critic on the policy's trunk."""

import copy
import math

import pytest
import torch
from transformers import PreTrainedModel

from plumbline.params.schema import LoraParams
from plumbline.training.lora import add_adapter
from plumbline.training.models import Models, ValueHead

LORA = LoraParams(enabled=True, rank=4, alpha=8.0)


def test_a_value_head_is_one_linear_layer() -> None:
    head = ValueHead(3, seed=0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        head.linear.bias.fill_(0.25)
    hidden = torch.tensor([[[1.0, 1.0, 2.0], [0.0, 3.0, 0.0]]])
    # 1 - 2 + 1 + 0.25; -6 + 0.25
    assert head(hidden).tolist() == [[0.25, -5.75]]


def test_a_value_head_starts_small_and_without_a_bias() -> None:
    head = ValueHead(4096, seed=0)
    weight = head.linear.weight.detach()
    assert not head.linear.bias.any()
    # The standard deviation of 4096 draws misses by 1/sqrt(2 * 4096), about a hundredth.
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert float(weight.mean().abs()) < 5 / 4096


def test_the_seed_alone_decides_a_value_heads_weights() -> None:
    first = ValueHead(16, seed=3).linear.weight
    torch.manual_seed(99)
    again, other = (ValueHead(16, seed).linear.weight for seed in (3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def names(group: list[torch.nn.Parameter], *modules: torch.nn.Module) -> bool:
    """Whether the group holds exactly the weights of the modules."""
    wanted = [id(weight) for module in modules for weight in module.parameters()]
    return sorted(map(id, group)) == sorted(wanted)


def test_policy_and_critic_have_norms_of_their_own(models: Models) -> None:
    critic = models.critic
    assert isinstance(critic, PreTrainedModel)
    (policy_name, policy), (critic_name, values) = models.trained
    assert (policy_name, critic_name) == ("policy", "val")
    assert names(policy, models.policy)
    assert names(values, critic)


def test_a_shared_trunk_has_one_norm(models: Models) -> None:
    head = ValueHead(32, seed=0)
    ((name, group),) = models._replace(critic=head).trained
    assert name == "policy"
    assert names(group, models.policy, head)


def test_without_a_critic_the_policy_alone_is_trained(models: Models) -> None:
    ((name, group),) = models._replace(critic=None).trained
    assert name == "policy"
    assert names(group, models.policy)


def test_frozen_weights_are_not_trained(models: Models) -> None:
    add_adapter(models.policy, LORA, seed=0)
    group = dict(models.trained)["policy"]
    assert group
    assert all(weight.requires_grad for weight in group)
    adapters = [weight for name, weight in models.policy.named_parameters() if "lora_" in name]
    assert sorted(map(id, group)) == sorted(map(id, adapters))


def test_the_reference_is_the_second_model(models: Models) -> None:
    with models.reference() as reference:
        assert reference is models.ref_policy


def test_the_reference_may_be_the_policy_without_its_adapter(models: Models) -> None:
    original = copy.deepcopy(models.policy)
    ids = torch.tensor([[7, 9, 250, 12, 40]])
    add_adapter(models.policy, LORA, seed=0)
    with torch.no_grad():
        for name, weight in models.policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    alone = models._replace(ref_policy=None)
    with torch.no_grad():
        expected = original(ids).logits
        before = models.policy(ids).logits
        with alone.reference() as reference:
            assert torch.equal(reference(ids).logits, expected)
        assert torch.equal(models.policy(ids).logits, before)
    assert not torch.equal(before, expected)
