"""The comparison of the policy with the SFT model on held-out prompts."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.scores import (
    bootstrap_mean,
    correlation,
    distinct_n,
    mean_gain,
    win_rate,
)
from plumbline.functions import TextScorer
from plumbline.ops.masked import masked_sum
from plumbline.params.schema import EvaluateParams
from plumbline.rollout.experience import Sequences, response_logprobs, score_sequences
from plumbline.rollout.generate import Responses, sample_responses
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
    """Of the reward model."""
    gold: list[float]
    """Empty where there is no gold scorer."""
    judge: list[float]
    """Empty where there is no judge."""
    kl: list[float]
    """To the reference, summed over a response's tokens, nats."""
    lengths: list[int]
    """Tokens, the end token included."""
    ended: list[bool]


class RepeatedScores(NamedTuple):
    """Scores of n answers to each prompt, [P, n]."""

    scores: np.ndarray
    """Of the reward model."""
    gold: np.ndarray | None
    judge: np.ndarray | None


class Batch(NamedTuple):
    """Responses to some of the prompts."""

    prompts: Sequence[str]
    responses: Responses
    sequences: Sequences
    texts: list[str]


def answer(
    model: PreTrainedModel,
    ref_policy: PreTrainedModel,
    reward_model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    sampling: Sampling,
    params: EvaluateParams,
    gold: TextScorer | None,
    progress: Progress,
    judge: PreTrainedModel | None = None,
) -> Answers:
    """Sample one response a prompt and score it.

    Args:
        model: answers.
        ref_policy: the KL is measured to it.
        reward_model: the one that training followed.
        encoder: of all the models.
        prompts: JSON lists of messages.
        sampling: how responses are drawn.
        params: the batch size.
        gold: scores the texts.
        progress: called after each batch with the prompts answered and all of them.
        judge: another reward model, which training did not follow.
    """
    answers = Answers([], [], [], [], [], [], [])
    for batch in sample_batches(model, encoder, prompts, sampling, params.batch_size):
        sequences, mask = batch.sequences, batch.responses.mask
        with torch.no_grad():
            logprobs = response_logprobs(model, sequences, sampling.temperature)
            ref_logprobs = response_logprobs(ref_policy, sequences, sampling.temperature)
        answers.texts.extend(batch.texts)
        answers.scores.extend(_scores(reward_model, batch))
        answers.gold.extend(_gold_scores(gold, batch))
        answers.judge.extend(_scores(judge, batch))
        answers.kl.extend(masked_sum(logprobs - ref_logprobs, mask, 1).tolist())
        answers.lengths.extend(mask.sum(1).tolist())
        answers.ended.extend(batch.responses.has_eos.tolist())
        progress(len(answers.texts), len(prompts))
    return answers


def answer_repeatedly(
    model: PreTrainedModel,
    reward_model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    n: int,
    sampling: Sampling,
    params: EvaluateParams,
    gold: TextScorer | None,
    progress: Progress,
    judge: PreTrainedModel | None = None,
) -> RepeatedScores:
    """Sample n independent responses a prompt and score them, for `best_of_n_curve`.

    The arguments are those of `answer`; progress counts responses.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    scores: list[float] = []
    gold_scores: list[float] = []
    judge_scores: list[float] = []
    for batch in sample_batches(model, encoder, repeated, sampling, params.batch_size):
        scores.extend(_scores(reward_model, batch))
        gold_scores.extend(_gold_scores(gold, batch))
        judge_scores.extend(_scores(judge, batch))
        progress(len(scores), len(repeated))

    def table(values: list[float]) -> np.ndarray:
        return np.array(values).reshape(len(prompts), n)

    return RepeatedScores(
        table(scores),
        None if gold is None else table(gold_scores),
        None if judge is None else table(judge_scores),
    )


def sample_batches(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[Batch]:
    """A response to each prompt, in batches."""
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        queries = encoder.prompts(batch)
        responses = sample_responses(
            model,
            queries,
            max_tokens=sampling.max_tokens,
            stop_token_ids=encoder.stop_token_ids,
            pad_token_id=encoder.pad_token_id,
            temperature=sampling.temperature,
            generator=generator,
        )
        sequences = Sequences.join(queries, responses, encoder.pad_token_id)
        yield Batch(batch, responses, sequences, encoder.decode(responses.lists()))


def _scores(model: PreTrainedModel | None, batch: Batch) -> list[float]:
    """A scalar model's score of each response."""
    if model is None:
        return []
    scores: list[float] = score_sequences(model, batch.sequences).tolist()
    return scores


def _gold_scores(gold: TextScorer | None, batch: Batch) -> list[float]:
    if gold is None:
        return []
    return [gold(*pair) for pair in zip(batch.prompts, batch.texts, strict=True)]


def compare(sft: Answers, policy: Answers, params: EvaluateParams, seed: int) -> dict[str, float]:
    """The metrics of two models' answers to the same prompts, named eval/…"""
    metrics: dict[str, float] = {"eval/prompts": float(len(sft.texts))}
    for name, answers in (("sft", sft), ("policy", policy)):
        for column, values in {**_judgements(answers), "kl": answers.kl}.items():
            mean = bootstrap_mean(values, params.bootstrap_samples, seed)
            metrics |= mean.metrics(f"eval/{name}/{column}")
        metrics |= {
            f"eval/{name}/length_mean": sum(answers.lengths) / len(answers.lengths),
            f"eval/{name}/ended_fraction": sum(answers.ended) / len(answers.ended),
            f"eval/{name}/distinct_1": distinct_n(answers.texts, 1),
            f"eval/{name}/distinct_2": distinct_n(answers.texts, 2),
            f"eval/{name}/score_length_correlation": correlation(answers.scores, answers.lengths),
        }
    theirs = _judgements(sft)
    for column, ours in _judgements(policy).items():
        wins = win_rate(ours, theirs[column], params.bootstrap_samples, seed)
        gain = mean_gain(ours, theirs[column], params.bootstrap_samples, seed)
        metrics |= wins.metrics("eval/win_rate" if column == "score" else f"eval/{column}_win_rate")
        metrics |= gain.metrics(f"eval/{column}_gain")
    return metrics


def sample_table(
    prompts: Sequence[str], sft: Answers, policy: Answers, rows: int
) -> list[dict[str, Any]]:
    """The first `rows` prompts with both answers and their scores."""
    table = []
    for index, prompt in enumerate(prompts[:rows]):
        row: dict[str, Any] = {"prompt": prompt}
        for name, answers in (("sft", sft), ("policy", policy)):
            row[name] = answers.texts[index]
            for column, values in _judgements(answers).items():
                row[f"{name}_{column}"] = values[index]
        table.append(row)
    return table


def _judgements(answers: Answers) -> dict[str, list[float]]:
    """Everything that scored the answers, by the name of its metrics."""
    columns = {"score": answers.scores, "gold": answers.gold, "judge": answers.judge}
    return {column: values for column, values in columns.items() if values}
