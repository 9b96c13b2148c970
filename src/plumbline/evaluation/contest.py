"""Two models' answers to the same prompts, judged by one scorer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from plumbline.data.collate import pad_right
from plumbline.data.tokenize import ChatEncoder
from plumbline.errors import ParamsError
from plumbline.evaluation.compare import Batch, Sampling, sample_batches
from plumbline.evaluation.scores import Interval, bootstrap_mean, distinct_n, mean_gain, win_rate
from plumbline.functions import TextScorer
from plumbline.rollout.experience import Sequences, score_sequences
from plumbline.rollout.generate import Responses
from plumbline.training.reporting import Progress

SIDES = ("champion", "challenger")


class Judged(NamedTuple):
    """One model's answers, a value a prompt."""

    texts: list[str]
    scores: list[float]
    lengths: list[int]
    """Tokens, the end token included."""
    ended: list[bool]


BatchScorer = Callable[[Batch], list[float]]
"""Scores each response of a batch."""


def text_scorer(score: TextScorer) -> BatchScorer:
    """A scorer of texts, such as the gold scorer."""
    return lambda batch: [score(*pair) for pair in zip(batch.prompts, batch.texts, strict=True)]


def model_scorer(model: PreTrainedModel, encoder: ChatEncoder, *, same_tokens: bool) -> BatchScorer:
    """A reward model as the scorer.

    Args:
        model: the scalar model.
        encoder: its own.
        same_tokens: whether the player's tokens are the scorer's: it then reads what was sampled,
            token by token, and else the text in its own tokens.
    """

    def score(batch: Batch) -> list[float]:
        sequences = batch.sequences if same_tokens else encode_again(batch, encoder)
        device = model.device
        sequences = Sequences(*(part.to(device) for part in sequences))
        scores: list[float] = score_sequences(model, sequences, len(batch.texts)).tolist()
        return scores

    return score


def encode_again(batch: Batch, encoder: ChatEncoder) -> Sequences:
    """A batch in the tokens of another encoder; a response that did not end stays open."""
    closed = encoder.responses(batch.texts)
    ended = batch.responses.has_eos.tolist()
    # An empty response keeps its end token, for a score needs a token to stand at.
    rows = [
        row if done or len(row) == 1 else row[:-1] for row, done in zip(closed, ended, strict=True)
    ]
    ids, mask = pad_right(rows, encoder.pad_token_id)
    responses = Responses(ids, mask, torch.tensor(ended), torch.zeros(mask.shape))
    return Sequences.join(encoder.prompts(batch.prompts), responses, encoder.pad_token_id)


def play(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int,
    score: BatchScorer,
    progress: Progress,
) -> Judged:
    """Sample one response a prompt and score it.

    Args:
        model: answers.
        encoder: its own.
        prompts: JSON lists of messages.
        sampling: how responses are drawn.
        batch_size: responses sampled or scored at a time.
        score: of each response.
        progress: called after each batch with the prompts answered and all of them.

    Raises:
        ParamsError: a prompt and its response could outgrow the model's context.
    """
    check_context(model, encoder, prompts, sampling.max_tokens)
    judged = Judged([], [], [], [])
    for batch in sample_batches(model, encoder, prompts, sampling, batch_size):
        judged.texts.extend(batch.texts)
        judged.scores.extend(score(batch))
        judged.lengths.extend(batch.responses.mask.sum(1).tolist())
        judged.ended.extend(batch.responses.has_eos.tolist())
        progress(len(judged.texts), len(prompts))
    return judged


def check_context(
    model: PreTrainedModel, encoder: ChatEncoder, prompts: Sequence[str], response_tokens: int
) -> None:
    """Check that every prompt and its response fit a model's context.

    Raises:
        ParamsError: one does not.
    """
    context = int(getattr(model.config, "max_position_embeddings", 2**31))
    longest = max(encoder.prompt_lengths(prompts))
    if longest + response_tokens > context:
        raise ParamsError(
            f"The longest held-out prompt has {longest} tokens of this model, and a response "
            f"{response_tokens}: expected at most {context} together, its context. These two "
            "models can't meet on these prompts."
        )


def contest_metrics(
    champion: Judged, challenger: Judged, samples: int, seed: int
) -> dict[str, float]:
    """What came of it, named contest/…

    Args:
        champion, challenger: their answers to the same prompts.
        samples: bootstrap resamplings.
        seed: of the resamplings.
    """
    ours, theirs = challenger.scores, champion.scores
    metrics = {
        "contest/prompts": float(len(ours)),
        **win_rate(ours, theirs, samples, seed).metrics("contest/win_rate"),
        **mean_gain(ours, theirs, samples, seed).metrics("contest/gain"),
        "contest/ties": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours),
    }
    for name, judged in zip(SIDES, (champion, challenger), strict=True):
        metrics |= bootstrap_mean(judged.scores, samples, seed).metrics(f"contest/{name}/score")
        metrics |= {
            f"contest/{name}/length_mean": sum(judged.lengths) / len(judged.lengths),
            f"contest/{name}/ended_fraction": sum(judged.ended) / len(judged.ended),
            f"contest/{name}/distinct_2": distinct_n(judged.texts, 2),
        }
    return metrics


def answer_table(
    prompts: Sequence[str], champion: Judged, challenger: Judged, rows: int
) -> list[dict[str, Any]]:
    """The first `rows` prompts with both answers and their scores."""
    return [
        {
            "prompt": prompt,
            "champion": champion.texts[index],
            "champion_score": champion.scores[index],
            "challenger": challenger.texts[index],
            "challenger_score": challenger.scores[index],
        }
        for index, prompt in enumerate(prompts[:rows])
    ]


def passes(wins: Interval, threshold: float) -> bool:
    """Whether a challenger may take the champion's place.

    The whole interval must lie above the threshold: two models that answer alike have a win rate
    of 0.5 with no width, and neither is better.
    """
    return wins.low > threshold
