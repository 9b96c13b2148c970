"""Models of RL, and a rollout with fixed answers whose numbers a naive loop finds out."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.params.schema import RLParams, SamplingParams
from plumbline.rollout.experience import Sequences
from plumbline.rollout.generate import Responses
from plumbline.training.models import Models
from plumbline.training.policy_update import Setting
from plumbline.training.reporting import ignore_progress, ignore_warnings
from plumbline.training.rl import train_rl

PAD, EOS = 0, 1


@pytest.fixture
def models(lm: PreTrainedModel, scorer: PreTrainedModel) -> Models:
    """Policy and critic as they start: copies of reference and reward model."""
    return Models(lm, copy.deepcopy(lm), scorer, copy.deepcopy(scorer))


@pytest.fixture(scope="session")
def make_setting() -> Callable[..., Setting]:
    """Makes a setting of 2 rollouts of 8 responses at a constant rate, but for what is named."""

    def make(
        *, response_tokens: int = 6, temperature: float = 1.0, precision: Any = "fp32", **rl: Any
    ) -> Setting:
        defaults: dict[str, Any] = {
            "episodes": 16,
            "rollout_batch_size": 8,
            "mini_batch_size": 8,
            "epochs": 1,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            # So few tokens seldom end: all would score the same.
            "missing_eos": "subtract",
            "missing_eos_score": 0.0,
        }
        sampling = SamplingParams(response_tokens=response_tokens, temperature=temperature)
        return Setting(RLParams(**{**defaults, **rl}), sampling, precision)

    return make


@pytest.fixture(scope="session")
def moved() -> Callable[..., Any]:
    """Makes small random changes to the trainable weights of a module, and returns it."""

    def move(module: torch.nn.Module, seed: int = 5, size: float = 0.02) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in module.parameters():
                if weight.requires_grad:
                    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                    weight.add_(noise * size)
        return module

    return move


@pytest.fixture(scope="session")
def weights() -> Callable[[torch.nn.Module], Tensor]:
    """All weights of a module in one tensor."""

    def flatten(module: torch.nn.Module) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in module.parameters()])

    return flatten


Rows = list[list[float]]


class Answered(NamedTuple):
    """Eight queries with their answers; what models say of each alone, without padding."""

    queries: list[list[int]]
    answers: list[list[int]]

    @property
    def responses(self) -> Responses:
        """The answers as if they had been sampled, each token for sure."""
        width = max(map(len, self.answers))
        mask = torch.tensor([[t < len(answer) for t in range(width)] for answer in self.answers])
        return Responses(
            torch.tensor([[*answer, *[PAD] * (width - len(answer))] for answer in self.answers]),
            mask,
            torch.tensor([answer[-1] == EOS for answer in self.answers]),
            torch.zeros(mask.shape),
        )

    @property
    def sequences(self) -> Sequences:
        return Sequences.join(self.queries, self.responses, PAD)

    def logits(self, model: PreTrainedModel) -> list[Tensor]:
        """[answer, V] each, before each token of the answer; with a gradient."""
        whole = [[*query, *answer] for query, answer in zip(*self, strict=True)]
        return [
            model(input_ids=torch.tensor([ids])).logits[0].double()[len(query) - 1 : -1]
            for ids, query in zip(whole, self.queries, strict=True)
        ]

    def tokens(self, model: PreTrainedModel, temperature: float = 1.0) -> tuple[Rows, Rows]:
        """Log-prob and entropy of each token of each answer."""
        logprobs, entropies = [], []
        with torch.no_grad():
            for logits, answer in zip(self.logits(model), self.answers, strict=True):
                logp = torch.log_softmax(logits / temperature, -1)
                logprobs.append([float(logp[t, token]) for t, token in enumerate(answer)])
                entropies.append((-(logp.exp() * logp).sum(-1)).tolist())
        return logprobs, entropies

    def readings(self, model: PreTrainedModel) -> Rows:
        """The scalar model's number before each token of each answer, and after the last."""
        rows = []
        for query, answer in zip(*self, strict=True):
            with torch.no_grad():
                hidden = model.base_model(input_ids=torch.tensor([[*query, *answer]]))
                numbers = hidden.last_hidden_state[0] @ model.score.weight[0]
            rows.append(numbers[len(query) - 1 :].tolist())
        return rows

    def real(self, column: Tensor) -> Rows:
        """A column [B, R] without what stands on the padding."""
        return [column[row, : len(answer)].tolist() for row, answer in enumerate(self.answers)]


@pytest.fixture(scope="session")
def answered() -> Answered:
    return Answered(
        [[7, 9, 250], [8], [44, 6, 5, 30, 61, 12], [99, 3], [20, 21], [15], [33, 34, 35], [70, 2]],
        [
            [12, 40, EOS],
            [200],
            [17, EOS],
            [5, 77, 140, 63, 29, 31],
            [EOS],
            [81, 82, 83, EOS],
            [90, 91, 92, 93, 94, EOS],
            [60, EOS],
        ],
    )


@pytest.fixture(scope="session")
def prompts(as_prompt: Callable[[str], str]) -> list[str]:
    """Eight prompts of a few tokens each."""
    return [as_prompt(text) for text in ("fold", "a", "old mill", "sky", "Why?", "in", "the", "it")]


@pytest.fixture(scope="session")
def run_rl(prompts: list[str], encoder: ChatEncoder) -> Callable[..., list[dict[str, float]]]:
    """Trains by RL, and returns the metrics of each rollout."""

    def run(
        models: Models, setting: Setting, *, seed: int = 0, encoder: Any = encoder
    ) -> list[dict[str, float]]:
        history: list[dict[str, float]] = []

        def log(step: int, metrics: Mapping[str, float]) -> None:
            assert step == metrics["episode"]
            history.append(dict(metrics))

        train_rl(
            models, prompts, encoder, setting, seed=seed, log=log, progress=ignore_progress,
            warn=ignore_warnings,
        )  # fmt: skip
        return history

    return run
