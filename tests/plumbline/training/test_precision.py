"""bf16: where it is chosen, what it touches, and that no narrow copy of a weight outlives it."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.params.schema import LoraParams
from plumbline.rollout.experience import response_logprobs, score_sequences
from plumbline.rollout.generate import Responses
from plumbline.training import rl
from plumbline.training.lora import add_adapter
from plumbline.training.models import Models, ValueHead
from plumbline.training.policy_update import Setting
from plumbline.training.precision import autocast, hold_narrow, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MakeSetting = Callable[..., Setting]
Flatten = Callable[[nn.Module], Tensor]


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, "fp32"),
        # A processor of another make names neither.
        ({"neon": True}, "fp32"),
    ],
)
def test_auto_is_bf16_on_processors_with_matrix_products_in_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bf16_on_gpus_that_do_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not supported})
    assert resolve_precision("auto", CUDA) == ("bf16" if supported else "fp32")


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_asked_for_is_what_is_taken(
    monkeypatch: pytest.MonkeyPatch, asked: Literal["fp32", "bf16"], device: torch.device
) -> None:
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"amx_bf16": able})
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        assert resolve_precision(asked, device) == asked


def test_matrix_products_alone_are_narrow() -> None:
    layer, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with autocast(CPU, "fp32"):
        assert layer(x).dtype == torch.float32
    with autocast(CPU, "bf16"):
        product = layer(x)
        assert product.dtype == torch.bfloat16
        assert norm(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32
    product.float().sum().backward()
    assert layer.weight.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_a_model_that_holds_narrow_matrices_says_the_same(
    family_lm: PreTrainedModel, answered: Any
) -> None:
    narrow = hold_narrow(copy.deepcopy(family_lm), "bf16")
    with torch.no_grad(), autocast(CPU, "bf16"):
        said = [response_logprobs(model, answered.sequences, 1.0) for model in (family_lm, narrow)]
    assert torch.equal(*said)
    matrices = [
        weight for name, weight in narrow.base_model.named_parameters()
        if weight.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name
    ]  # fmt: skip
    assert {weight.dtype for weight in matrices} == {torch.bfloat16}
    assert narrow.get_input_embeddings().weight.dtype == torch.float32
    assert narrow.get_output_embeddings().weight.dtype == torch.float32
    wide = hold_narrow(copy.deepcopy(family_lm), "fp32")
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}


def test_a_reward_model_that_holds_narrow_matrices_scores_the_same(
    scorer: PreTrainedModel, answered: Any
) -> None:
    with torch.no_grad(), autocast(CPU, "bf16"):
        scores = score_sequences(scorer, answered.sequences)
        narrow = hold_narrow(copy.deepcopy(scorer), "bf16")
        assert torch.equal(score_sequences(narrow, answered.sequences), scores)


# RL


def with_critic(models: Models, name: str) -> Models:
    critic = {"reward_model": models.critic, "shared": ValueHead(32, seed=0), "none": None}
    return models._replace(critic=critic[name])


def bf16(make_setting: MakeSetting, critic: str, **changes: Any) -> Setting:
    options = {"algorithm": "rloo"} if critic == "none" else {"critic": critic}
    return make_setting(precision="bf16", **{**options, **changes})


each_critic = pytest.mark.parametrize("critic", ["reward_model", "shared", "none"])


@each_critic
def test_the_first_update_starts_within_rounding(
    models: Models, make_setting: MakeSetting, run_rl: Any, critic: str
) -> None:
    first = run_rl(with_critic(models, critic), bf16(make_setting, critic, episodes=8))[0]
    # bf16 has 8 binary digits, and logits here go up to about 10.
    assert first["val/ratio"] == pytest.approx(1, abs=0.01)
    assert first["policy/ratio_max"] < 1.15
    assert first["policy/approxkl_avg"] < 1e-3
    assert 0 < first["val/decode_gap_max"] < 0.15
    assert first["objective/kl"] == first["objective/kl_k3"] == 0


@each_critic
def test_weights_and_gradients_stay_wide(
    models: Models, make_setting: MakeSetting, run_rl: Any, weights: Flatten, critic: str
) -> None:
    models = with_critic(models, critic)
    before = weights(models.policy)
    run_rl(models, bf16(make_setting, critic, learning_rate=1e-4))
    trained = [m for m in (models.policy, models.critic) if m is not None]
    for module in trained:
        for weight in module.parameters():
            assert weight.dtype == torch.float32
            assert weight.grad is not None
            assert weight.grad.dtype == torch.float32
    # Adam moves most weights by the rate, far less than the 8 digits of bf16 would show.
    change = (weights(models.policy) - before).abs()
    assert float((change > 0).float().mean()) > 0.5
    assert float(change.max()) < 1e-3


@pytest.mark.parametrize(
    ("precision", "width"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_sampling_scoring_and_update_are_of_one_width(
    models: Models, make_setting: MakeSetting, run_rl: Any, precision: str, width: torch.dtype
) -> None:
    seen: set[tuple[str, bool, torch.dtype]] = set()

    def watch(name: str, layer: nn.Module) -> None:
        layer.register_forward_hook(
            lambda _, __, output: seen.add((name, torch.is_grad_enabled(), output.dtype))
        )

    for name, model in models._asdict().items():
        if model is not None:
            watch(name, model.transformer.h[0].mlp.c_fc)
    run_rl(models, make_setting(precision=precision, episodes=8))
    frozen = {(name, False, width) for name in ("policy", "ref_policy", "reward_model", "critic")}
    assert seen == frozen | {("policy", True, width), ("critic", True, width)}


def gradients(models: Models, setting: Setting, run_rl: Any) -> Tensor:
    """Of the policy in the only step of a rollout, at a rate that moves nothing."""
    run_rl(models, setting)
    return torch.cat([weight.grad.flatten() for weight in models.policy.parameters()])


@each_critic
def test_gradients_point_where_those_of_fp32_do(
    models: Models, make_setting: MakeSetting, run_rl: Any, critic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The same tokens for both: bf16 would draw others.
    drawn: list[Responses] = []
    sample = rl.sample_responses

    def once(*inputs: Any, **options: Any) -> Responses:
        if not drawn:
            drawn.append(sample(*inputs, **options))
        return drawn[0]

    monkeypatch.setattr(rl, "sample_responses", once)
    setting = bf16(make_setting, critic, episodes=8, learning_rate=1e-12, max_grad_norm=1e9)
    found = [
        gradients(with_critic(copy.deepcopy(models), critic), setting._replace(precision=p), run_rl)
        for p in ("fp32", "bf16")
    ]
    assert not torch.equal(*found)
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.98


@each_critic
def test_micro_batches_share_narrow_weights_and_each_leaves_its_gradient(
    models: Models, make_setting: MakeSetting, run_rl: Any, critic: str
) -> None:
    found = []
    for tokens in (4096, 20, 1):
        setting = bf16(
            make_setting, critic, episodes=8, learning_rate=1e-12, max_grad_norm=1e9,
            micro_batch_tokens=tokens,
        )  # fmt: skip
        found.append(gradients(with_critic(copy.deepcopy(models), critic), setting, run_rl))
    for split in found[1:]:
        assert float((split - found[0]).norm() / found[0].norm()) < 0.05


@each_critic
def test_sampling_uses_the_weights_of_the_last_step(
    models: Models, make_setting: MakeSetting, run_rl: Any, critic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # What the policy says at the start of each rollout, from weights that were never cast.
    batches: list[tuple[Responses, Tensor]] = []
    original = rl.make_experience

    def spy(models: Models, sequences: Any, responses: Responses, *rest: Any) -> Any:
        fresh = copy.deepcopy(models.policy)
        with torch.autocast("cpu", enabled=False):
            batches.append((responses, response_logprobs(fresh, sequences, 1.0)))
        return original(models, sequences, responses, *rest)

    monkeypatch.setattr(rl, "make_experience", spy)
    setting = bf16(make_setting, critic, episodes=24, epochs=2, learning_rate=1e-2)
    history = run_rl(with_critic(models, critic), setting)
    assert len(batches) == 3
    for (responses, logprobs), metrics in zip(batches, history, strict=True):
        gap = (responses.logprobs - logprobs).abs()[responses.mask]
        assert float(gap.max()) < 0.3
        assert metrics["val/decode_gap_max"] < 0.3
    # And these steps were large: stale weights would be far off, and at the reference.
    assert min(metrics["objective/kl_k3"] for metrics in history[1:]) > 0.05


def test_the_second_epoch_sees_the_step_of_the_first(
    models: Models, make_setting: MakeSetting, run_rl: Any
) -> None:
    setting = bf16(make_setting, "reward_model", episodes=8, epochs=2, learning_rate=1e-2)
    (metrics,) = run_rl(models, setting)
    # The mean of nearly 0 and of what one step did.
    assert metrics["policy/approxkl_avg"] > 0.01


def test_adapters_in_bf16_start_at_the_reference_and_leave_it(
    models: Models, make_setting: MakeSetting, run_rl: Any
) -> None:
    lora = LoraParams(enabled=True, rank=4, alpha=8.0)
    add_adapter(models.policy, lora, seed=0)
    models = models._replace(ref_policy=None, critic=None)
    history = run_rl(models, bf16(make_setting, "none", lora=lora, epochs=2, learning_rate=1e-2))
    assert history[0]["objective/kl"] == history[0]["objective/kl_k3"] == 0
    assert history[0]["policy/ratio_max"] > 1.01
    assert history[1]["objective/kl_k3"] > 1e-3
    assert history[1]["val/decode_gap_max"] < 0.3


def test_gradient_checkpointing_recomputes_in_the_same_precision(
    models: Models, make_setting: MakeSetting, run_rl: Any, weights: Flatten
) -> None:
    results = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(models)
        setting = bf16(make_setting, "reward_model", gradient_checkpointing=checkpointing)
        run_rl(trained, setting)
        results.append(weights(trained.policy))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
