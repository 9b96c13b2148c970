"""All that an RL training has beside its models, from which a checkpoint lets it go on."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from plumbline.ops.kl import AdaptiveKLController, FixedKLController
from plumbline.params.schema import RLParams
from plumbline.rollout.experience import Experience, Sequences
from plumbline.training.checkpoint import Checkpoints, Keeper, Place, State
from plumbline.training.credit import Baseline
from plumbline.training.models import Models
from plumbline.training.monitor import Finding, Monitor
from plumbline.training.perf import Work
from plumbline.training.policy_update import Optimizer, Update
from plumbline.training.state import (
    load_networks,
    load_optimizer,
    load_random,
    load_schedule,
    on_device,
    random_state,
    schedule_state,
    weights_state,
)


class Rollout(NamedTuple):
    """Responses that are sampled and scored, ready for the update."""

    experience: Experience
    metrics: dict[str, float]
    """Of the rollout, with the seconds that it took."""
    work: Work
    """Of sampling and scoring."""


class RLState:
    """Optimizer, generators, controllers and history of a training, and how far it has come.

    Its commit points are the end of each rollout, of each mini-batch and of each update.
    """

    def __init__(
        self,
        models: Models,
        prompts: int,
        params: RLParams,
        seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """The state of a training that starts; `prompts` counts them."""
        self.params = params
        self.device = models.policy.device
        self.networks: dict[str, nn.Module] = {"policy": models.policy}
        if models.critic is not None:
            self.networks["critic"] = models.critic
        self.optimizer = Optimizer.of(models, params)
        self.sampling = torch.Generator(self.device).manual_seed(seed)
        self.shuffling = torch.Generator().manual_seed(seed)
        self.batches = PromptBatches(prompts, params, self.shuffling)
        self.controller = make_kl_controller(params)
        self.baseline = Baseline(params)
        self.monitor = Monitor(params)
        self.history: list[Mapping[str, float]] = []
        self.findings: list[tuple[int, Finding]] = []
        """Each with its episode."""
        self.rollout: Rollout | None = None
        """The one whose update is not finished."""
        self.update = Update()
        self.keeper = Keeper(checkpoints, lambda: weights_state(self.networks, self.optimizer.adam))

    @property
    def episode(self) -> int:
        """Responses that the policy has learned from."""
        return len(self.history) * self.params.rollout_batch_size

    def commit(self) -> None:
        """Note that the training can go on from here; to be called inside `uninterrupted()`."""
        self.keeper.commit(self._place(), self._snapshot)

    def close_rollout(self, rollout: Mapping[str, float]) -> list[Finding]:
        """Take the metrics of a rollout whose update is done; returns what looks wrong in them."""
        self.history.append(rollout)
        self.controller.update(rollout["objective/kl"], self.params.rollout_batch_size)
        findings = self.monitor.watch(self.history)
        self.findings += [(self.episode, finding) for finding in findings]
        self.rollout, self.update = None, Update()
        self.commit()
        return findings

    def resume(self) -> bool:
        """Go on from the newest checkpoint; returns whether there was one."""
        state = self.keeper.resume()
        if state is None:
            return False
        load_networks(self.networks, state["weights"])
        load_optimizer(self.optimizer.adam, state["weights"])
        load_schedule(*self.optimizer, state)
        load_random(state["random"])
        self.sampling.set_state(state["sampling"])
        self.shuffling.set_state(state["shuffling"])
        self.batches.left = state["prompts_left"]
        self.controller.value = state["kl_coef"]
        self.baseline.average = state["baseline"]
        self.monitor.last_seen = state["last_seen"]
        self.history = state["history"]
        self.findings = [(episode, Finding(*finding)) for episode, finding in state["findings"]]
        self.rollout = _load_rollout(state["rollout"], self.device)
        done = state["update"]
        self.update = Update(**{**done, "work": Work(*done["work"])})
        return True

    def _place(self) -> Place:
        params = self.params
        planned = params.epochs * (params.rollout_batch_size // params.mini_batch_size)
        label = f"episode {self.episode} of {params.episodes}"
        number = len(self.history) * (planned + 2)
        if self.rollout is not None:
            done = len(self.update.stats)
            number += 1 + done
            label += f", {done} mini-batches into the update that follows"
        return Place(number, self.episode, label)

    def _snapshot(self) -> State:
        return {
            **schedule_state(*self.optimizer),
            "random": random_state(),
            "sampling": self.sampling.get_state(),
            "shuffling": self.shuffling.get_state(),
            "prompts_left": self.batches.left,
            "kl_coef": self.controller.value,
            "baseline": self.baseline.average,
            "last_seen": dict(self.monitor.last_seen),
            "history": list(self.history),
            "findings": list(self.findings),
            "rollout": None if self.rollout is None else _rollout_state(self.rollout),
            "update": {
                **vars(self.update),
                "stats": list(self.update.stats),
                "work": self.update.work.numbers(),
            },
        }


def _rollout_state(rollout: Rollout) -> State:
    sequences = rollout.experience.sequences._asdict()
    columns = {**rollout.experience._asdict(), "sequences": sequences}
    return {
        "experience": columns,
        "metrics": rollout.metrics,
        "work": rollout.work.numbers(),
    }


def _load_rollout(state: State | None, device: torch.device) -> Rollout | None:
    if state is None:
        return None
    columns = on_device(state["experience"], device)
    sequences = Sequences(**columns.pop("sequences"))
    return Rollout(Experience(sequences, **columns), state["metrics"], Work(*state["work"]))


def make_kl_controller(params: RLParams) -> FixedKLController | AdaptiveKLController:
    """The controller that the params name."""
    if params.kl_controller == "adaptive":
        return AdaptiveKLController(params.kl_coef, params.kl_target, params.kl_horizon)
    return FixedKLController(params.kl_coef)


class PromptBatches:
    """The prompts of each rollout without end, by index, in a fresh random order each pass.

    Where an algorithm compares the responses to a prompt, each prompt stands so many times side by
    side.
    """

    def __init__(self, prompts: int, params: RLParams, generator: torch.Generator) -> None:
        """Draw the orders of so many prompts from `generator`."""
        self.prompts = prompts
        self.copies = params.responses_per_prompt if params.algorithm in ("rloo", "grpo") else 1
        self.size = params.rollout_batch_size // self.copies
        self.generator = generator
        self.left: list[int] = []
        """Of the orders drawn so far; replaced, never changed in place."""

    def __iter__(self) -> Iterator[list[int]]:
        """Itself: each batch is drawn once."""
        return self

    def __next__(self) -> list[int]:
        """The next rollout's."""
        left = self.left
        while len(left) < self.size:
            left = left + torch.randperm(self.prompts, generator=self.generator).tolist()
        self.left = left[self.size :]
        return [index for index in left[: self.size] for _ in range(self.copies)]
