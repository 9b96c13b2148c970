"""Adapters: nothing at the start, nothing else trained, merged without loss, in every family."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from plumbline.models.load import load_lm
from plumbline.models.scalar_head import (
    load_scalar_model,
    scalar_model_from_lm,
    score_head,
    sequence_scores,
)
from plumbline.params.schema import LoraParams, SFTParams
from plumbline.training.lora import (
    adapter_off,
    add_adapter,
    load_merged,
    merge_adapter,
    save_adapter,
    trained_as_adapter,
)
from plumbline.training.models import Models, ValueHead
from plumbline.training.policy_update import Setting
from plumbline.training.reporting import ignore_metrics, ignore_progress
from plumbline.training.sft import held_out_loss, train_sft

LORA = LoraParams(enabled=True, rank=4, alpha=8.0)
IDS = torch.tensor([[7, 9, 250, 12, 40, 99], [3, 44, 5, 5, 61, 30]])

Move = Callable[..., Any]
Flatten = Callable[[nn.Module], Tensor]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def scores(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return sequence_scores(model, IDS, torch.ones_like(IDS).bool())


def adapter_names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.fixture
def adapted(family_lm: PreTrainedModel, moved: Move) -> PreTrainedModel:
    """With an adapter that changes what the model says."""
    add_adapter(family_lm, LORA, seed=0)
    model: PreTrainedModel = moved(family_lm, size=0.1)
    return model


def test_at_first_the_model_says_what_it_said(family_lm: PreTrainedModel) -> None:
    before = logits(family_lm)
    add_adapter(family_lm, LORA, seed=0)
    assert torch.equal(logits(family_lm), before)
    assert not any(module.training for module in family_lm.modules())


def test_only_adapters_are_trainable_on_all_linear_layers_of_the_blocks(
    family_lm: PreTrainedModel,
) -> None:
    # All matrices of the blocks, and neither embeddings nor the output layer.
    matrices = {
        name.removesuffix(".weight")
        for name, weight in family_lm.named_parameters()
        if weight.dim() == 2 and (".h." in name or ".layers." in name)
    }
    add_adapter(family_lm, LORA, seed=0)
    trainable = {name for name, weight in family_lm.named_parameters() if weight.requires_grad}
    assert trainable == {
        f"{name}.lora_{part}.default.weight" for name in matrices for part in ("A", "B")
    }
    assert len(matrices) == 2 * (4 if family_lm.config.model_type == "gpt2" else 7)


def test_rank_and_alpha_are_those_of_the_params(family_lm: PreTrainedModel) -> None:
    # The update is alpha / rank * B A: here 3 / 2, of a layer that keeps its matrix transposed
    # or not.
    before = {name: weight.detach().clone() for name, weight in family_lm.named_parameters()}
    add_adapter(family_lm, LoraParams(enabled=True, rank=2, alpha=3.0), seed=0)
    factors: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, weight in family_lm.named_parameters():
            if weight.requires_grad:
                layer, _, part = name.removesuffix(".default.weight").rpartition(".lora_")
                weight.normal_()
                factors.setdefault(layer, {})[part] = weight.clone()
    merge_adapter(family_lm)
    after = dict(family_lm.named_parameters())
    assert factors
    for layer, parts in factors.items():
        assert parts["A"].shape[0] == parts["B"].shape[1] == 2
        update = 1.5 * parts["B"] @ parts["A"]
        change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        if family_lm.config.model_type == "gpt2":
            change = change.T
        torch.testing.assert_close(change, update, atol=1e-5, rtol=1e-5)


def test_the_seed_alone_decides_an_adapters_weights(shared_family_lm: PreTrainedModel) -> None:
    found = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        model = copy.deepcopy(shared_family_lm)
        add_adapter(model, LORA, seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append({n: w for n, w in model.named_parameters() if "lora_A" in n})
    first, again, other = found
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert not any(torch.equal(other[name], weight) for name, weight in first.items())


def test_without_its_adapter_the_model_is_the_reference(
    shared_family_lm: PreTrainedModel, adapted: PreTrainedModel
) -> None:
    before = logits(adapted)
    with adapter_off(adapted) as reference:
        assert torch.equal(logits(reference), logits(shared_family_lm))
    assert torch.equal(logits(adapted), before)
    assert not torch.equal(before, logits(shared_family_lm))
    for name, weight in adapted.named_parameters():
        assert weight.requires_grad == ("lora_" in name)


def test_an_adapter_comes_back_after_a_failure(adapted: PreTrainedModel) -> None:
    before = logits(adapted)
    with pytest.raises(RuntimeError), adapter_off(adapted):
        raise RuntimeError
    assert torch.equal(logits(adapted), before)


def test_merging_says_the_same_with_plain_weights(
    adapted: PreTrainedModel, shared_family_lm: PreTrainedModel, tmp_path: Path
) -> None:
    before = logits(adapted)
    merge_adapter(adapted)
    torch.testing.assert_close(logits(adapted), before, atol=1e-5, rtol=1e-5)
    plain = dict(shared_family_lm.named_parameters())
    assert {name: w.shape for name, w in adapted.named_parameters()} == {
        name: w.shape for name, w in plain.items()
    }
    assert all(weight.requires_grad for weight in adapted.parameters())
    assert {type(m) for m in adapted.modules()} == {type(m) for m in shared_family_lm.modules()}
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("adapter*"))
    for loaded in (load_lm(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded.eval()), logits(adapted))


def test_a_merged_model_takes_the_next_adapter(adapted: PreTrainedModel, moved: Move) -> None:
    # SFT, reward model and RL may each train one.
    merge_adapter(adapted)
    before = logits(adapted)
    add_adapter(adapted, LORA, seed=1)
    assert torch.equal(logits(adapted), before)
    moved(adapted, size=0.1)
    assert not torch.equal(logits(adapted), before)
    with adapter_off(adapted):
        assert torch.equal(logits(adapted), before)


def test_an_adapter_is_saved_alone_and_merged_where_it_is_loaded(
    adapted: PreTrainedModel, shared_family_lm: PreTrainedModel, tmp_path: Path
) -> None:
    save_adapter(adapted, tmp_path, base="sha256:abc")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == len(adapter_names(adapted))
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    assert not (tmp_path / "model.safetensors").exists()
    assert (
        '"base_model_name_or_path": "sha256:abc"' in (tmp_path / "adapter_config.json").read_text()
    )
    # In an order of their own: a set's differs between processes, and so would the digest.
    targets = json.loads((tmp_path / "adapter_config.json").read_bytes())["target_modules"]
    assert targets == sorted(targets)
    loaded = copy.deepcopy(shared_family_lm)
    load_merged(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-5, rtol=1e-5)
    assert not adapter_names(loaded)
    assert all(weight.requires_grad for weight in loaded.parameters())


# Scalar models


@pytest.fixture
def scalar_model(family_lm: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    family_lm.save_pretrained(tmp_path / "lm")
    return scalar_model_from_lm(tmp_path / "lm", seed=1).eval()


def test_a_score_head_is_trained_in_full(
    scalar_model: PreTrainedModel, moved: Move, tmp_path: Path
) -> None:
    before = scores(scalar_model)
    add_adapter(scalar_model, LORA, seed=0)
    assert torch.equal(scores(scalar_model), before)
    head = score_head(scalar_model)
    assert isinstance(head, nn.Linear)
    assert head.weight.requires_grad
    trainable = [name for name, w in scalar_model.named_parameters() if w.requires_grad]
    assert set(trainable) == {"score.weight", *adapter_names(scalar_model)}
    moved(scalar_model, size=0.1)
    trained = scores(scalar_model)
    assert not torch.equal(trained, before)
    merge_adapter(scalar_model)
    torch.testing.assert_close(scores(scalar_model), trained, atol=1e-5, rtol=1e-5)
    scalar_model.save_pretrained(tmp_path / "merged")
    loaded = load_scalar_model(tmp_path / "merged").eval()
    assert torch.equal(scores(loaded), scores(scalar_model))


# Training


def test_nothing_is_added_where_lora_is_off(lm: PreTrainedModel, weights: Flatten) -> None:
    before = weights(lm)
    with trained_as_adapter(lm, LoraParams(), seed=0):
        assert not adapter_names(lm)
        assert all(weight.requires_grad for weight in lm.parameters())
    assert torch.equal(weights(lm), before)


ROWS = [
    {"prompt": [3, 10 + row, 11, 1, 4], "response": [40 + row, 41, 42, 43 + row, 1]}
    for row in range(8)
]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trains_adapters_and_merges_them(
    family_lm: PreTrainedModel, shared_family_lm: PreTrainedModel, gradient_checkpointing: bool
) -> None:
    before = held_out_loss(family_lm, ROWS, 8, 0)
    params = SFTParams(
        epochs=15, batch_size=8, micro_batch_tokens=64, learning_rate=1e-2, schedule="constant",
        warmup_fraction=0.0, lora=LORA, gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    train_sft(
        family_lm, ROWS, params, pad_token_id=0, seed=0, log=ignore_metrics,
        progress=ignore_progress,
    )  # fmt: skip
    assert held_out_loss(family_lm, ROWS, 8, 0) < 0.7 * before
    plain = dict(shared_family_lm.named_parameters())
    trained = dict(family_lm.named_parameters())
    assert trained.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(plain[name], trained[name])}
    assert changed == {
        name
        for name, weight in plain.items()
        if weight.dim() == 2 and (".h." in name or ".layers." in name)
    }
    assert not any(module.training for module in family_lm.modules())


@pytest.mark.parametrize("critic", ["none", "shared", "reward_model"])
def test_rl_trains_adapters_against_the_model_without_them(
    models: Models, make_setting: Callable[..., Setting], run_rl: Any, weights: Flatten,
    critic: str,
) -> None:  # fmt: skip
    base = copy.deepcopy(models.policy)
    add_adapter(models.policy, LORA, seed=0)
    changes: dict[str, Any] = {"algorithm": "rloo"} if critic == "none" else {"critic": critic}
    heads: dict[str, Any] = {"none": None, "shared": ValueHead(32, seed=0)}
    if critic == "reward_model":
        assert isinstance(models.critic, PreTrainedModel)
        add_adapter(models.critic, LORA, seed=1)
        heads[critic] = models.critic
    models = models._replace(ref_policy=None, critic=heads[critic])
    frozen = {
        name: weight.detach().clone()
        for part in (models.policy, models.critic)
        if part is not None
        for name, weight in part.named_parameters()
        if not weight.requires_grad
    }
    setting = make_setting(**changes, episodes=24, lora=LORA, learning_rate=1e-2, epochs=2)
    history = run_rl(models, setting)
    assert history[0]["objective/kl"] == history[0]["objective/kl_k3"] == 0
    assert history[0]["val/decode_gap_max"] < 1e-4
    assert history[1]["objective/kl_k3"] > 1e-4
    assert history[2]["objective/kl_k3"] > 1e-4
    for part in (models.policy, models.critic):
        if part is None:
            continue
        for name, weight in part.named_parameters():
            assert weight.requires_grad or torch.equal(weight, frozen[name])
            assert weight.requires_grad == (weight.grad is not None)
    # The reference is still the model of the start, bit for bit.
    with models.reference() as reference:
        assert torch.equal(logits(reference), logits(base))
    trained = logits(models.policy)
    merge_adapter(models.policy)
    torch.testing.assert_close(logits(models.policy), trained, atol=1e-5, rtol=1e-5)


def test_rl_with_adapters_is_rl_against_a_copy_of_the_start(
    models: Models, make_setting: Callable[..., Setting], run_rl: Any, weights: Flatten
) -> None:
    histories = []
    for apart in (True, False):
        trained = copy.deepcopy(models)
        add_adapter(trained.policy, LORA, seed=0)
        reference = trained.ref_policy if apart else None
        trained = trained._replace(ref_policy=reference, critic=None)
        setting = make_setting(algorithm="rloo", lora=LORA, learning_rate=1e-2, kl_coef=0.5)
        histories.append(([row["objective/kl"] for row in run_rl(trained, setting)], trained))
    (kl, first), (other_kl, second) = histories
    assert kl == other_kl
    assert torch.equal(weights(first.policy), weights(second.policy))
    assert kl[1] != 0


def test_gradient_checkpointing_changes_no_adapter(
    models: Models, make_setting: Callable[..., Setting], run_rl: Any, weights: Flatten
) -> None:
    results = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(models)
        add_adapter(trained.policy, LORA, seed=0)
        trained = trained._replace(ref_policy=None, critic=None)
        run_rl(
            trained, make_setting(algorithm="rloo", lora=LORA, gradient_checkpointing=checkpointing)
        )
        assert not any(module.training for module in trained.policy.modules())
        assert not trained.policy.get_input_embeddings()._forward_hooks
        results.append(weights(trained.policy))
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)
