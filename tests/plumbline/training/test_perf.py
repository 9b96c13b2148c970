"""How fast a training is, counted by hand."""

import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from plumbline.params.schema import LoraParams, SupervisedParams
from plumbline.rollout.generate import Responses
from plumbline.training import perf
from plumbline.training.lora import add_adapter
from plumbline.training.models import Models
from plumbline.training.perf import Cost, Pace, Work, matmul_rate
from plumbline.training.rl_work import sampling_work, scoring_work, update_work
from plumbline.training.supervised import fit

# The fixture `answered` holds an object of a class that pytest keeps to itself.
Answered = Any
CPU = torch.device("cpu")


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def test_costs_by_hand() -> None:
    # A layer: queries and output 8 x 8, keys and values 8 x 4, gate, up and down 8 x 12.
    trunk = 2 * (2 * 64 + 2 * 32 + 3 * 96)
    # In each layer 4 heads of 2: query with key, and weight with value.
    assert Cost.of(llama()) == Cost(trunk, trunk, 400, 400, 2 * 2 * 8)


def test_flops_by_hand() -> None:
    cost = Cost(trunk=10, trunk_trained=10, head=100, head_trained=100, attention=1000)
    # 5 tokens, 1 predicts; tokens of 3 and 2 look at 1 + 2 + 3 and 1 + 2.
    assert cost.forward([3, 2], 1) == 2 * (50 + 100 + 9000)
    assert cost.training([3, 2], 1) == 3 * cost.forward([3, 2], 1)
    # Weights that are not trained have no gradient of their own.
    frozen = cost._replace(trunk_trained=1, head_trained=0)
    assert frozen.training([3, 2], 1) == 4 * (50 + 100 + 9000) + 2 * (5 + 9000)


def test_an_adapter_trains_few_weights() -> None:
    model = llama()
    before = Cost.of(model)
    add_adapter(model, LoraParams(enabled=True, rank=1), seed=0)
    cost = Cost.of(model)
    adapters = 2 * (2 * 16 + 2 * 12 + 3 * 20)
    assert cost == before._replace(
        trunk=before.trunk + adapters, trunk_trained=adapters, head_trained=0
    )


def test_metrics_by_hand() -> None:
    work = Work(30, 40, 600.0) + Work(30, 40, 0.0)
    assert Work(*work.numbers()) == work
    assert work.metrics(seconds=3.0, rate=400.0) == {
        "perf/flops_per_s": 200.0,
        "perf/mfu": 0.5,
        "perf/padding_share": 0.25,
    }


def test_a_pace_is_that_since_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(perf.time, "perf_counter", lambda: now)
    pace = Pace(rate=1000.0)
    for _ in range(2):
        pace.add(Work(20, 20, 400.0), 3)
        pace.add(Work(20, 60, 400.0), 5)
        now += 2.0
        assert pace.take() == {
            "perf/tokens_per_s": 20.0,
            "perf/rows_per_s": 4.0,
            "perf/flops_per_s": 400.0,
            "perf/mfu": 0.4,
            "perf/padding_share": 0.5,
            "time/update_s": 2.0,
        }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rate_is_measured_once_and_quickly(precision: Any) -> None:
    matmul_rate.cache_clear()
    started = time.process_time()
    rate = matmul_rate(CPU, precision)
    assert time.process_time() - started < 2
    assert 1e8 < rate < 1e15
    assert matmul_rate(CPU, precision) == rate


def test_work_of_a_rollout_by_hand(models: Models, answered: Answered) -> None:
    policy, scorer = Cost.of(models.policy), Cost.of(models.reward_model)
    lengths = [len(q) + len(a) for q, a in zip(answered.queries, answered.answers, strict=True)]
    said = sum(map(len, answered.answers))
    scoring = scoring_work(models, answered.sequences, 4096)
    # Policy, reference, reward model and critic.
    assert scoring.tokens == scoring.computed == 4 * sum(lengths)
    assert scoring.flops == pytest.approx(
        2 * policy.forward(lengths, said) + 2 * scorer.forward(lengths, 0)
    )
    update = update_work(models, answered.sequences, 4096)
    assert update.tokens == update.computed == 2 * sum(lengths)
    assert update.flops == pytest.approx(
        policy.training(lengths, said) + scorer.training(lengths, 0)
    )


def test_a_repeated_query_is_counted_once(models: Models) -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    responses = Responses(mask.long(), mask, mask[:, 1], mask.float(), computed=20)
    work = sampling_work(models.policy, [[5, 6, 7], [5, 6, 7], [8]], responses)
    # Two queries of 3 and 1 tokens; of the responses all but the last token.
    assert (work.tokens, work.computed) == (4 + 2, 20)
    cost = Cost.of(models.policy)
    assert work.flops == pytest.approx(cost.forward([4, 3, 2], 5) - cost.forward([3], 0))


@pytest.mark.parametrize(
    ("lengths", "shared", "packed", "tokens", "passes"),
    [
        ([1], 0, True, 1, 2),
        # Packed, four rows of 3 + 2 tokens fit into 12, since two of them stand there once.
        ([3, 2], 2, True, 3, 2),
        ([3, 2], 2, False, 5, 4),
    ],
)
def test_a_training_logs_its_pace(
    lengths: list[int], shared: int, packed: bool, tokens: int, passes: int
) -> None:
    logged: list[dict[str, float]] = []
    seen: list[int] = []
    model = torch.nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: seen.append(1))
    fit(
        model, [{"x": 1.0 * row} for row in range(8)],
        lambda rows: {
            "input": torch.tensor([[row["x"]] for row in rows]), "labels": torch.ones(len(rows))
        },
        SupervisedParams(epochs=1, batch_size=4, micro_batch_tokens=12),
        section="sft", lengths=lambda _: lengths, shared=lambda _: shared,
        predicting=lambda _: 0, packed=packed,
        loss=lambda y, labels, num_items_in_batch: y.sum() / num_items_in_batch,
        seed=0, precision="fp32", log=lambda _, metrics: logged.append(dict(metrics)),
        progress=lambda *_: None,
    )  # fmt: skip
    (row,) = logged
    # Eight rows, one weight: forward, and two gradients.
    assert row["perf/rows_per_s"] == pytest.approx(8 / row["time/update_s"])
    assert row["perf/tokens_per_s"] == pytest.approx(8 * tokens / row["time/update_s"])
    assert row["perf/flops_per_s"] == pytest.approx(8 * tokens * 6 / row["time/update_s"])
    assert row["perf/padding_share"] == 0 or not packed
    assert row["perf/mfu"] < 1
    assert len(seen) == passes
