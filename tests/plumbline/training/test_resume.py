"""A training that is interrupted and resumed ends in the same bits as one that never stopped."""

import copy
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.errors import TrainingError
from plumbline.params.schema import (
    CheckpointParams,
    DPOParams,
    LoraParams,
    RewardModelParams,
    SFTParams,
)
from plumbline.training import rl
from plumbline.training.checkpoint import Checkpoints, Keeper, Place
from plumbline.training.dpo import pair_logprobs, train_dpo
from plumbline.training.lora import add_adapter
from plumbline.training.models import Models, ValueHead
from plumbline.training.reporting import ignore_progress
from plumbline.training.reward_model import train_reward_model
from plumbline.training.rl import train_rl
from plumbline.training.sft import train_sft

PAD, EOS = 0, 1
LORA = {"lora": LoraParams(enabled=True, rank=4, alpha=8.0)}
# 14 rows: with batches of 4 the last one of an epoch is short.
ROWS: list[dict[str, Any]] = [
    {
        "prompt": [3, *range(10 + row, 12 + row + row % 4), EOS, 4],
        "chosen": [*range(40 + row, 41 + row + (row * 5) % 9), 200, EOS],
        "rejected": [*range(60 + row, 61 + row + (row * 7) % 5), 201, EOS],
    }
    for row in range(14)
]
# 12 optimizer steps of 2 micro-batches each, logged after 10 and 12.
SUPERVISED: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 4,
    "micro_batch_tokens": 40,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_fraction": 0.2,
    "weight_decay": 0.1,
}


class Ended(NamedTuple):
    """What a training leaves."""

    weights: list[Tensor]
    history: list[dict[str, float]]
    warnings: list[tuple[int, str, str]]


class Training(NamedTuple):
    """A training that can be run again and again from the same start."""

    run: Callable[[Checkpoints | None, Callable[[nn.Module], None]], Ended]
    """Takes what is done to the trained model before it is trained."""


def untouched(model: nn.Module) -> None:
    """Done to a model that is left alone."""


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}


def all_weights(*modules: nn.Module | None) -> list[Tensor]:
    return [
        weight.detach().clone() for module in modules if module for weight in module.parameters()
    ]


def assert_same_bits(one: Ended, other: Ended) -> None:
    assert one.history == other.history
    assert one.warnings == other.warnings
    assert len(one.weights) == len(other.weights)
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


def supervised(
    model: PreTrainedModel, train: Callable[..., None], params: Any, **options: Any
) -> Training:
    def run(checkpoints: Checkpoints | None, prepare: Callable[[nn.Module], None]) -> Ended:
        mine = copy.deepcopy(model)
        more = {
            name: option(mine) if callable(option) else option for name, option in options.items()
        }
        prepare(mine)
        history: list[dict[str, float]] = []
        train(
            mine, params=params, pad_token_id=PAD, seed=7, progress=ignore_progress,
            log=lambda step, metrics: history.append({"step": step, **timeless(metrics)}),
            checkpoints=checkpoints, **more,
        )  # fmt: skip
        return Ended(all_weights(mine), history, [])

    return Training(run)


REINFORCE = {"algorithm": "reinforce", "baseline": "moving_average"}
RL: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo_shared": {"critic": "shared"},
    "ppo_lora": LORA,
    "ppo_target_kl": {"target_kl": 1e-3, "epochs": 3},
    "ppo_adaptive_kl": {"kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 20},
    "reinforce": REINFORCE,
    "reinforce_lora": {**REINFORCE, **LORA},
    "grpo": {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
}
NAMES = ["sft", "sft_lora", "reward_model", "ratings", "dpo", "dpo_lora", *RL]
each_training = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def training(
    name: str,
    shared_lm: PreTrainedModel,
    shared_scorer: PreTrainedModel,
    prompts: list[str],
    encoder: ChatEncoder,
    make_setting: Callable[..., Any],
) -> Training:
    lora = LORA if name.endswith("lora") else {}
    if name.startswith("sft"):
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in ROWS]
        return supervised(shared_lm, train_sft, SFTParams(**SUPERVISED, **lora), rows=rows)
    if name in ("reward_model", "ratings"):
        objective: Any = "pairwise" if name == "reward_model" else "pointwise"
        rated = [
            {"prompt": row["prompt"], "response": row[side], "label": side == "chosen"}
            for row in ROWS
            for side in ("chosen", "rejected")
        ]
        return supervised(
            shared_scorer, train_reward_model,
            RewardModelParams(**SUPERVISED, objective=objective),
            rows=ROWS if name == "reward_model" else rated[:14], prefix="judge",
        )  # fmt: skip
    if name.startswith("dpo"):
        # The reference is read off the SFT model, also in a run that goes on.
        def reference(model: PreTrainedModel) -> Any:
            found = pair_logprobs(model, ROWS, 4, PAD)
            if lora:
                add_adapter(model, LORA["lora"], seed=3)
            return found

        return supervised(
            shared_lm, train_dpo, DPOParams(**SUPERVISED, **lora), rows=ROWS, reference=reference
        )
    changes: dict[str, Any] = {
        "episodes": 24, "mini_batch_size": 4, "micro_batch_tokens": 40, "epochs": 2,
        "schedule": "linear", "warmup_fraction": 0.3, "weight_decay": 0.1,
    }  # fmt: skip
    setting = make_setting(response_tokens=4, **{**changes, **RL[name]})

    def run(checkpoints: Checkpoints | None, prepare: Callable[[nn.Module], None]) -> Ended:
        lm, scorer = copy.deepcopy(shared_lm), copy.deepcopy(shared_scorer)
        reference = None if lora else copy.deepcopy(lm)
        critic: Any = None
        if name.startswith("ppo"):
            critic = ValueHead(32, seed=3) if name == "ppo_shared" else copy.deepcopy(scorer)
        if lora:
            for each in filter(None, (lm, critic)):
                add_adapter(each, LORA["lora"], seed=3)
        prepare(lm)
        history: list[dict[str, float]] = []
        warnings: list[tuple[int, str, str]] = []
        train_rl(
            Models(lm, reference, scorer, critic), prompts[:5], encoder, setting, seed=7,
            log=lambda _, metrics: history.append(timeless(metrics)), progress=ignore_progress,
            warn=lambda *said: warnings.append(said), checkpoints=checkpoints,
        )  # fmt: skip
        return Ended(all_weights(lm, critic), history, warnings)

    return Training(run)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, also where the tests were started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def places() -> list[Place]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, places: list[Place]) -> Checkpoints:
    """Only interruptions and the end write to it."""
    return Checkpoints(
        tmp_path / "key", CheckpointParams(), resumed=places.append,
        warn=lambda message: pytest.fail(message),
    )  # fmt: skip


def run_until_done(
    training: Training,
    checkpoints: Checkpoints,
    prepare: Callable[[nn.Module], None] = untouched,
    at_most: int = 200,
) -> tuple[Ended, int]:
    """Start again after each interruption; returns how often that was."""
    for interruptions in range(at_most):
        try:
            return training.run(checkpoints, prepare), interruptions
        except KeyboardInterrupt:
            # As in a new process: nothing of the generators is left.
            random.seed(interruptions)
            np.random.seed(interruptions)
            torch.manual_seed(interruptions)
    pytest.fail(f"not done after {at_most} interruptions")


@each_training
def test_an_interruption_at_every_commit_point_changes_no_bit(
    training: Training,
    name: str,
    checkpoints: Checkpoints,
    places: list[Place],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = training.run(None, untouched)
    assert len(expected.history) >= 2
    commit = Keeper.commit

    def commit_and_interrupt(keeper: Keeper, place: Place, snapshot: Any) -> None:
        commit(keeper, place, snapshot)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Keeper, "commit", commit_and_interrupt)
    ended, interruptions = run_until_done(training, checkpoints)
    assert_same_bits(ended, expected)
    assert [place.number for place in places] == sorted({place.number for place in places})
    assert len(places) == interruptions
    # Of RL's 3 rollouts with an update of 4 mini-batches each; a target may end updates early.
    least = 3 * 2 if name == "ppo_target_kl" else 3 * (1 + 4 + 1)
    assert interruptions >= (least if name in RL else 12)


@pytest.mark.parametrize("name", ["sft", "dpo_lora", "ppo", "grpo"])
def test_a_signal_during_an_optimizer_step_waits_for_the_commit(
    training: Training, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = training.run(None, untouched)
    step = torch.optim.AdamW.step

    def step_and_interrupt(adam: torch.optim.AdamW, closure: Any = None) -> None:
        signal.raise_signal(signal.SIGINT)
        step(adam, closure)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_interrupt)
    ended, interruptions = run_until_done(training, checkpoints)
    assert_same_bits(ended, expected)
    # Each of them was taken once: none was lost, none was repeated.
    assert interruptions == 12


@each_training
def test_interruptions_anywhere_change_no_bit(
    training: Training, checkpoints: Checkpoints, places: list[Place]
) -> None:
    expected = training.run(None, untouched)
    lives = random.Random(5)

    def mortal(model: nn.Module) -> None:
        """In the middle of a forward or a backward pass it is over."""
        left = lives.randint(4, 16)

        def count(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        model.get_submodule("transformer.h.1.ln_1").register_forward_pre_hook(count)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in (trained[0], trained[-1]):
            weight.register_hook(count)

    ended, interruptions = run_until_done(training, checkpoints, mortal)
    assert_same_bits(ended, expected)
    assert interruptions >= 2
    assert places


@pytest.mark.parametrize("name", ["ppo", "ppo_target_kl", "ppo_adaptive_kl", "reinforce", "grpo"])
@pytest.mark.parametrize(
    "part", ["sample_responses", "score_responses", "make_experience", "update"]
)
def test_a_rollout_that_is_interrupted_is_done_again(
    training: Training,
    checkpoints: Checkpoints,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = training.run(None, untouched)
    original = getattr(rl, part)
    calls = 0

    def do_and_interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        # What it changed is there, and no commit has noted it.
        if calls in (2, 4):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(rl, part, do_and_interrupt)
    ended, interruptions = run_until_done(training, checkpoints)
    assert_same_bits(ended, expected)
    assert interruptions == 2


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_the_process_s_generators_go_on_where_they_were(
    training: Training, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and reward functions may draw from them; here each commit point does."""
    drawn: list[tuple[float, float, float]] = []
    commit = Keeper.commit
    stop_at = math.inf

    def draw(keeper: Keeper, place: Place, snapshot: Any) -> None:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        commit(keeper, place, snapshot)
        if len(drawn) == stop_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Keeper, "commit", draw)

    def seeded(model: nn.Module) -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    training.run(checkpoints, seeded)
    checkpoints.clear()
    expected = [*drawn]
    for place in (1, 4, 7, len(expected)):
        stop_at = place
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            training.run(checkpoints, seeded)
        training.run(checkpoints, untouched)
        assert drawn == expected
        checkpoints.clear()


@each_training
def test_a_finished_training_takes_no_further_step(
    training: Training, name: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = training.run(checkpoints, untouched)
    kept = checkpoints.newest()
    assert kept is not None
    assert kept.label == ("episode 24 of 24" if name in RL else "step 12 of 12")
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("no step is left to take")
    )
    assert_same_bits(training.run(checkpoints, untouched), expected)


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo"])
def test_a_damaged_newest_checkpoint_costs_only_what_came_after_the_one_before(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = training.run(None, untouched)
    warned: list[str] = []
    places: list[Place] = []
    checkpoints = Checkpoints(
        tmp_path / "key", CheckpointParams(every_steps=1, keep=2),
        warn=warned.append, resumed=places.append,
    )  # fmt: skip
    commit = Keeper.commit
    commits = 0

    def commit_and_die(keeper: Keeper, place: Place, snapshot: Any) -> None:
        nonlocal commits
        commit(keeper, place, snapshot)
        commits += 1
        if commits == 8:
            raise MemoryError("as good as SIGKILL: nothing is saved on it")

    monkeypatch.setattr(Keeper, "commit", commit_and_die)
    with pytest.raises(MemoryError):
        training.run(checkpoints, untouched)
    before, newest = sorted(os.listdir(checkpoints.folder))
    file = checkpoints.folder / newest / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert_same_bits(training.run(checkpoints, untouched), expected)
    assert "tensors.safetensors does not match its sha256" in warned[0]
    assert [place.number for place in places] == [int(before)]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_checkpoints_change_no_bit_of_a_training_that_is_not_interrupted(
    training: Training, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    expected = training.run(None, untouched)
    after = torch.rand(())
    torch.manual_seed(3)
    checkpoints = Checkpoints(tmp_path / "key", CheckpointParams(every_steps=1, keep=3))
    assert_same_bits(training.run(checkpoints, untouched), expected)
    assert torch.rand(()) == after
    assert len(os.listdir(checkpoints.folder)) == 3


# Errors


@each_training
def test_a_full_gpu_names_the_fields_to_change(
    training: Training, name: str, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path / "key", CheckpointParams(every_steps=1))
    calls = 0

    def fill(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    with pytest.raises(TrainingError) as caught:
        training.run(
            checkpoints,
            lambda model: (
                model.get_submodule("transformer.h.0.ln_1").register_forward_pre_hook(fill) and None
            ),
        )
    section = {"ratings": "reward_model"}.get(name, "rl" if name in RL else name.split("_lora")[0])
    message = str(caught.value)
    assert message.startswith(f"{section}: the GPU's memory is full (CUDA out of memory.")
    assert "More." not in message
    assert f"lower {section}.micro_batch_tokens, which is 40 (the longest row has " in message
    assert f"set {section}.gradient_checkpointing to true" in message
    kept = checkpoints.newest()
    assert kept is not None
    assert f"The checkpoint at {kept.label} is kept" in message


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    training: Training, name: str, tmp_path: Path
) -> None:
    warned: list[str] = []
    checkpoints = Checkpoints(
        tmp_path / "key", CheckpointParams(every_steps=1, keep=1), warn=warned.append
    )
    calls = 0

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * (math.nan if calls > 14 and torch.is_grad_enabled() else 1.0)

    with pytest.raises(TrainingError) as caught:
        training.run(
            checkpoints,
            lambda model: (
                model.get_submodule("transformer.h.0.ln_1").register_forward_hook(spoil) and None
            ),
        )
    found = checkpoints.latest()
    assert found is not None
    assert found.place.label in str(caught.value)
    section = "rl" if name == "ppo" else name
    assert f"lower {section}.learning_rate" in str(caught.value)
    weights = found.state["weights"]["networks"]
    assert all(
        bool(torch.isfinite(weight).all())
        for network in weights.values()
        for weight in network.values()
    )


# Processes


def test_a_killed_process_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    """One process trains by SFT and then by RL, and is killed three times on the way."""
    script = Path(__file__).with_name("long_training.py")

    def start(folder: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, script, tmp_path / folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with start("whole") as whole:
        _, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors
    instants = random.Random(11)
    said = ""
    for training, number, sign in (
        ("sft", signal.SIGTERM, "Terminated"),
        ("rl", signal.SIGINT, "KeyboardInterrupt"),
        ("rl", signal.SIGKILL, ""),
    ):
        with start("parts") as process:
            assert process.stdout is not None
            left = instants.randint(5, 10)
            while left:
                said += (line := process.stdout.readline())
                left -= line.startswith(f"{training}: ")
            time.sleep(instants.random() * 0.05)
            process.send_signal(number)
            output, errors = process.communicate(timeout=100)
        said += output
        assert process.returncode != 0
        assert sign in errors
        assert os.listdir(tmp_path / "parts" / training)
    with start("parts") as last:
        output, errors = last.communicate(timeout=200)
    assert last.returncode == 0, errors
    said += output
    assert said.count("sft goes on from step") == 3
    assert said.count("sft goes on from step 80 of 80") == 2
    assert said.count("rl goes on from episode") == 2
    for file in ("weights", "history.json"):
        parts, undisturbed = ((tmp_path / name / file).read_bytes() for name in ("parts", "whole"))
        assert parts == undisturbed
