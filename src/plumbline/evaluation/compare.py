"""The comparison of the policy with the SFT model on held-out prompts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.scores import (
    GoldScorer,
    bootstrap_mean,
    correlation,
    distinct_n,
    win_rate,
)
from plumbline.ops.masked import masked_sum
from plumbline.params.schema import EvaluateParams
from plumbline.rollout.experience import Sequences, response_logprobs, score_sequences
from plumbline.rollout.generate import sample_responses
from plumbline.training.reporting import Progress


class Sampling(NamedTuple):
    """How responses are drawn: as in training, so that the KL is that of the trained policy."""

    max_tokens: int
    temperature: float
    seed: int


class Answers(NamedTuple):
    """One model's answers to the held-out prompts, a value a prompt."""

    texts: list[str]
    scores: list[float]
    gold: list[float]
    kl: list[float]
    lengths: list[int]
    ended: list[bool]


def answer(
    model: PreTrainedModel,
    ref_policy: PreTrainedModel,
    reward_model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    sampling: Sampling,
    params: EvaluateParams,
    gold: GoldScorer | None,
    progress: Progress,
) -> Answers:
    """Sample one response a prompt and score it.

    Args:
        model: answers.
        ref_policy: the KL is measured to it, summed over a response's tokens, in nats.
        prompts: JSON lists of messages.
        progress: called after each batch with the prompts answered and all of them.
    """
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    answers = Answers([], [], [], [], [], [])
    for start in range(0, len(prompts), params.batch_size):
        batch = prompts[start : start + params.batch_size]
        queries = encoder.prompts(batch)
        responses = sample_responses(
            model,
            queries,
            max_tokens=sampling.max_tokens,
            eos_token_id=encoder.eos_token_id,
            pad_token_id=encoder.pad_token_id,
            temperature=sampling.temperature,
            generator=generator,
        )
        sequences = Sequences.join(queries, responses, encoder.pad_token_id)
        with torch.no_grad():
            logprobs, _ = response_logprobs(model, sequences, sampling.temperature)
            ref_logprobs, _ = response_logprobs(ref_policy, sequences, sampling.temperature)
        texts = encoder.decode(responses.lists())
        answers.texts.extend(texts)
        answers.scores.extend(score_sequences(reward_model, sequences, params.batch_size).tolist())
        answers.kl.extend(masked_sum(logprobs - ref_logprobs, responses.mask, 1).tolist())
        answers.lengths.extend(responses.mask.sum(1).tolist())
        answers.ended.extend(responses.has_eos.tolist())
        if gold is not None:
            answers.gold.extend(gold(*pair) for pair in zip(batch, texts, strict=True))
        progress(len(answers.texts), len(prompts))
    return answers


def compare(sft: Answers, policy: Answers, params: EvaluateParams, seed: int) -> dict[str, float]:
    """The metrics of two models' answers to the same prompts, named eval/…"""
    metrics: dict[str, float] = {"eval/prompts": float(len(sft.texts))}
    for name, answers in (("sft", sft), ("policy", policy)):
        columns: dict[str, Sequence[float]] = {"score": answers.scores, "kl": answers.kl}
        if answers.gold:
            columns["gold"] = answers.gold
        for column, values in columns.items():
            mean, low, high = bootstrap_mean(values, params.bootstrap_samples, seed)
            metrics[f"eval/{name}/{column}"] = mean
            metrics[f"eval/{name}/{column}_low"] = low
            metrics[f"eval/{name}/{column}_high"] = high
        metrics |= {
            f"eval/{name}/length_mean": sum(answers.lengths) / len(answers.lengths),
            f"eval/{name}/ended_fraction": sum(answers.ended) / len(answers.ended),
            f"eval/{name}/distinct_1": distinct_n(answers.texts, 1),
            f"eval/{name}/distinct_2": distinct_n(answers.texts, 2),
            f"eval/{name}/score_length_correlation": correlation(answers.scores, answers.lengths),
        }
    wins = win_rate(policy.scores, sft.scores, params.bootstrap_samples, seed)
    metrics |= {
        "eval/win_rate": wins.mean,
        "eval/win_rate_low": wins.low,
        "eval/win_rate_high": wins.high,
    }
    if sft.gold:
        gold_wins = win_rate(policy.gold, sft.gold, params.bootstrap_samples, seed)
        metrics |= {
            "eval/gold_win_rate": gold_wins.mean,
            "eval/gold_win_rate_low": gold_wins.low,
            "eval/gold_win_rate_high": gold_wins.high,
        }
    return metrics


def sample_table(
    prompts: Sequence[str], sft: Answers, policy: Answers, rows: int
) -> list[dict[str, Any]]:
    """The first `rows` prompts with both answers and their scores."""
    table = []
    for index, prompt in enumerate(prompts[:rows]):
        row: dict[str, Any] = {"prompt": prompt}
        for name, answers in (("sft", sft), ("policy", policy)):
            row |= {name: answers.texts[index], f"{name}_score": answers.scores[index]}
            if answers.gold:
                row[f"{name}_gold"] = answers.gold[index]
        table.append(row)
    return table
