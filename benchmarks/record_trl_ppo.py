"""Record what TRL's PPO computes on tiny models, for the tests that compare Plumbline with it.

TRL 1.12.0 is the last release with PPO (in `trl.experimental.ppo`). It gets an environment of its
own, so that nothing of Plumbline needs it:

    python3 -m venv .plumbline/trl-venv
    .plumbline/trl-venv/bin/pip install torch==2.13.0
    .plumbline/trl-venv/bin/pip install trl==1.12.0 transformers==5.23.0
    .plumbline/trl-venv/bin/python benchmarks/record_trl_ppo.py

It runs `PPOTrainer.train()` as it is on random models (no network, no GPU, about 10 seconds) and
writes `tests/plumbline/training/trl_ppo.json`, which `test_trl_parity.py` beside it reads. The same
versions on the same kind of CPU write the same bytes.

No formula is written again here. Every number is read from the local variables of `train()`, in
the moments when it calls something that can be wrapped:

- `empty_cache()`, right after the advantages: all of the rollout;
- `masked_whiten(values, ...)`: rewards and advantages before whitening;
- `get_reward(reward_model, ...)`: the scores before the penalty for a missing end token;
- `accelerator.backward(loss)`: new log-probabilities and values are told to keep their gradient;
- the end of `with accelerator.accumulate(model)`: all of one forward and backward pass.

The models are in float64, and so are TRL's formulas. Only the log-probabilities of the rollout are
float32: Transformers samples from float32 logits. All floats are written with every digit.

The file holds, a run: `config` (TRL's names), then `rollouts`, then in each `steps`, one for each
backward pass. Names are those of the variables in `train()`, except for
`scores_before_penalty`, `token_rewards` (before whitening), `rewards` (as GAE uses them),
`advantages_before_whitening`, `new_logprobs_grad` and `vpred_grad` (gradients of what TRL
differentiates: `(pg_loss + vf_coef * vf_loss) / gradient_accumulation_steps`). Masks are 1 where
TRL's are True, which is on padding.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OUTPUT = Path(__file__).parents[1] / "tests/plumbline/training/trl_ppo.json"

PAD, EOS, VOCABULARY = 0, 1, 20
QUERIES = 64
ROLLOUTS = 2

# Large steps and narrow clip ranges, so that both losses are clipped often; seeds that give
# responses of every kind: ended at once, in the middle, by the last token, and not at all.
RUNS: dict[str, dict[str, Any]] = {
    "k1": {
        "seed": 0,
        "family": "gpt2",
        "kl_estimator": "k1",
        "whiten_rewards": False,
        "missing_eos_penalty": 1.5,
        "gamma": 0.95,
        "lam": 0.9,
        "kl_coef": 0.1,
        "cliprange": 0.1,
        "cliprange_value": 0.1,
        "vf_coef": 0.1,
        "temperature": 0.7,
        "learning_rate": 0.02,
        "num_ppo_epochs": 3,
        "per_device_train_batch_size": 8,
    },
    "k3-whitened": {
        "seed": 4,
        "family": "llama",
        "kl_estimator": "k3",
        "whiten_rewards": True,
        "missing_eos_penalty": 0.5,
        "gamma": 0.9,
        "lam": 0.8,
        "kl_coef": 0.2,
        "cliprange": 0.05,
        "cliprange_value": 0.05,
        "vf_coef": 0.5,
        "temperature": 1.0,
        "learning_rate": 0.05,
        "num_ppo_epochs": 3,
        "per_device_train_batch_size": 8,
    },
    "k1-whitened-undiscounted": {
        "seed": 2,
        "family": "llama",
        "kl_estimator": "k1",
        "whiten_rewards": True,
        "missing_eos_penalty": None,
        "gamma": 1.0,
        "lam": 0.95,
        "kl_coef": 0.05,
        "cliprange": 0.1,
        "cliprange_value": 0.1,
        "vf_coef": 0.1,
        "temperature": 1.0,
        "learning_rate": 0.02,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": 8,
    },
    "k3-accumulated": {
        "seed": 3,
        "family": "gpt2",
        "kl_estimator": "k3",
        "whiten_rewards": False,
        "missing_eos_penalty": 1.0,
        "gamma": 0.99,
        "lam": 0.95,
        "kl_coef": 0.1,
        "cliprange": 0.1,
        "cliprange_value": 0.05,
        "vf_coef": 0.2,
        "temperature": 0.9,
        "learning_rate": 0.03,
        "num_ppo_epochs": 2,
        # Two backward passes of 4 responses to an optimizer step.
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; TRL needs it to pad the queries, on the left."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


def make_policy(family: str) -> PreTrainedModel:
    """A random language model in float64 that never draws the pad token.

    TRL takes a pad that was drawn for the end of the response; what it computes then compares with
    nothing.
    """
    model = GPT2LMHeadModel(gpt2()) if family == "gpt2" else LlamaForCausalLM(llama())
    model.generation_config.pad_token_id = PAD

    def without_pad(_: nn.Module, __: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([PAD]), -1e4)

    model.lm_head.register_forward_hook(without_pad)
    return model.double()


def make_scorer(family: str) -> PreTrainedModel:
    """A random reward or value model in float64."""
    if family == "gpt2":
        return GPT2ForSequenceClassification(gpt2()).double()
    return LlamaForSequenceClassification(llama()).double()


def gpt2() -> GPT2Config:
    """A GPT-2 whose weights are large enough for its outputs to differ between tokens."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )


def llama() -> LlamaConfig:
    """A Llama, likewise."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )


def make_queries() -> Dataset:
    """Prompts of 2 to 6 random tokens, with neither pad nor end token."""
    lengths = torch.randint(2, 7, (QUERIES,)).tolist()
    rows = [torch.randint(2, VOCABULARY, (length,)).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows})


def make_trainer(config: dict[str, Any], folder: str) -> PPOTrainer:
    """TRL's trainer on fresh models; policy and reference differ from the first rollout on."""
    options = dict(config)
    family = options.pop("family")
    batch = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    args = PPOConfig(
        output_dir=folder,
        total_episodes=ROLLOUTS * batch,
        response_length=8,
        stop_token="eos",
        local_rollout_forward_batch_size=4,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        **options,
    )
    return PPOTrainer(
        args=args,
        processing_class=make_tokenizer(),
        model=make_policy(family),
        ref_model=make_policy(family),
        reward_model=make_scorer(family),
        value_model=make_scorer(family),
        train_dataset=make_queries(),
    )


ROLLOUT = (
    "context_length",
    "responses",
    "padding_mask",
    "padding_mask_p1",
    "contain_eos_token",
    "logprobs",
    "ref_logprobs",
    "values",
    "scores",
    "kl",
    "rewards",
    "returns",
    "advantages",
)
STEP = (
    "micro_batch_inds",
    "new_logprobs",
    "vpred",
    "pg_loss",
    "vf_loss",
    "loss",
    "approxkl",
    "pg_clipfrac",
    "vf_clipfrac",
)


def plain(value: Any) -> Any:
    """A tensor, an array or a number as JSON, with every digit."""
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach()
        return (tensor.int() if tensor.dtype == torch.bool else tensor).tolist()
    return value


@contextmanager
def recording(trainer: PPOTrainer) -> Iterator[list[dict[str, Any]]]:
    """What `trainer.train()` computes inside the block, a dictionary a rollout."""
    rollouts: list[dict[str, Any]] = []
    before: dict[str, Any] = {}

    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        before["token_rewards" if not shift_mean else "advantages_before_whitening"] = plain(values)
        return whiten(values, mask, shift_mean)

    def get_reward(model: nn.Module, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        result = score(model, *args)
        if model is trainer.reward_model:
            before.setdefault("scores_before_penalty", []).extend(plain(result[1]))
        return result

    def empty_cache() -> None:
        seen = sys._getframe(1).f_locals
        # train() empties the cache in many places; this is the first one after the advantages.
        if "advantages" in seen and seen["update"] > len(rollouts):
            rollout = {name: plain(seen[name]) for name in ROLLOUT}
            rollouts.append({"token_rewards": rollout["rewards"]} | before | rollout)
            rollouts[-1]["steps"] = []
            before.clear()

    def backward(loss: Tensor) -> None:
        seen = sys._getframe(1).f_locals
        seen["new_logprobs"].retain_grad()
        seen["vpred"].retain_grad()
        differentiate(loss)

    class Accumulate:
        """TRL's `with accelerator.accumulate(model)`, read when the block ends."""

        def __init__(self, model: nn.Module) -> None:
            self.block = accumulate(model)

        def __enter__(self) -> None:
            self.block.__enter__()

        def __exit__(self, *exception: Any) -> None:
            seen = sys._getframe(1).f_locals
            step = {name: plain(seen[name]) for name in STEP}
            step["new_logprobs_grad"] = plain(seen["new_logprobs"].grad)
            step["vpred_grad"] = plain(seen["vpred"].grad)
            rollouts[-1]["steps"].append(step)
            self.block.__exit__(*exception)

    whiten: Callable[..., Tensor] = ppo_trainer.masked_whiten
    score: Callable[..., tuple[Tensor, Tensor, Tensor]] = ppo_trainer.get_reward
    accumulate = trainer.accelerator.accumulate
    differentiate: Callable[[Tensor], None] = trainer.accelerator.backward
    with (
        mock.patch.object(ppo_trainer, "masked_whiten", masked_whiten),
        mock.patch.object(ppo_trainer, "get_reward", get_reward),
        mock.patch.object(ppo_trainer, "empty_cache", empty_cache),
        mock.patch.object(trainer.accelerator, "backward", backward),
        mock.patch.object(trainer.accelerator, "accumulate", Accumulate),
    ):
        yield rollouts


def record(config: dict[str, Any]) -> dict[str, Any]:
    """One run of TRL's PPO: its config and what it computed."""
    seed = config["seed"]
    # TRL shuffles its mini-batches by NumPy's global generator, which it does not seed.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder)
        with recording(trainer) as rollouts:
            trainer.train()
    steps = trainer.args.gradient_accumulation_steps
    return {
        "config": config | {"gradient_accumulation_steps": steps},
        "rollouts": rollouts,
    }


def main() -> None:
    """Record every run and write the file."""
    parser = argparse.ArgumentParser(description="Record what TRL's PPO computes on tiny models.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    output: Path = parser.parse_args().output
    # One thread: the order of a sum, and with it the last digit, then depends on nothing else.
    torch.set_num_threads(1)
    recorded = {
        "recorded_with": {name: version(name) for name in ("trl", "torch", "transformers")},
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "runs": {name: record(config) for name, config in RUNS.items()},
    }
    output.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")
    print(f"{output}: {output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
