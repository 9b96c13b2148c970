"""Known failures of reinforcement learning, seen in the metrics of its rollouts."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from plumbline.params.schema import RLParams, reward_name

History = Sequence[Mapping[str, float]]
"""The metrics of each rollout, oldest first."""

WINDOW = 5
"""Rollouts behind each judgement: one alone is noisy, and many would delay the warning."""
SHARE = 5
"""In a long run, a window for the observers is 1/5 of it: they may fall slower than they vary."""
STANDARD_ERRORS = 4.5
"""By how many a change must pass 0: more than the usual 2 or 3, for it is looked for after each
rollout and from the best window on. With a flat observer at most 1 of 60 simulated runs warned."""

KL_FAR = 10.0
"""Nats a response: as far as the best of 60,000 answers is from one (log n - (n - 1) / n)."""
KL_GROWTH = 1.5
"""Against the rollouts before; under a KL penalty the curve flattens instead of going on so."""
KL_A_TOKEN_GROWING = 0.2
"""Nats: a long response may pass KL_FAR although each of its tokens is near the reference."""
KL_A_TOKEN = 0.5
"""Nats: a token is 1.6 times as likely as under the reference. The quickstart ends at 0.1, and runs
with a higher learning rate or a weaker penalty that still learned at 0.3 to 0.46."""
KL_OVER_TARGET = 2.0
"""The adaptive controller already acts at its strongest from 1.2 times the target on."""
ENTROPY_LEFT = 0.25
"""Of the SFT model's. The quickstart keeps 0.7, and 0.4 in a longer run with a weaker penalty."""
LENGTH_CHANGE = 1.5
"""Against the SFT model, longer or shorter. The quickstart's responses change by a tenth."""
RATIO_MAX = 100.0
"""One token among thousands may become much likelier without harm. The quickstart stays below 5;
with three times its learning rate, twice its epochs and no penalty it reaches 1,000."""
K3_ROUNDING = 1e-6
"""Nats a token; float32 is off by 1e-7, and an exact k3 is never negative."""
CLIPPED = 0.95
"""Of the responses: the few that ended may have done so by chance."""


class Finding(NamedTuple):
    """A failure that the metrics show."""

    name: str
    """Always the same for the same failure."""
    message: str
    """What is seen, why it matters, and what to do."""


class Monitor:
    """Watches a run, and says when a failure begins."""

    def __init__(self, params: RLParams) -> None:
        self.params = params
        self.last_seen: dict[str, int] = {}
        """Rollouts until each failure was seen last; a resumed run sets it as it was."""

    def watch(self, history: History) -> list[Finding]:
        """The failures that begin with the last rollout; to be called after each one.

        A failure that stays is said once, and again only after it was away for a whole window.
        """
        began = []
        for finding in find_failures(history, self.params):
            last = self.last_seen.get(finding.name, -math.inf)
            if len(history) - last > WINDOW:
                began.append(finding)
            self.last_seen[finding.name] = len(history)
        return began


def find_failures(history: History, params: RLParams) -> list[Finding]:
    """The failures that the history shows at its end; a metric that is not there is not judged."""
    if not history:
        return []
    weightless = [
        reward_name(function) for function, weight in params.rewards.items() if not weight
    ]
    observers = ["judge", *(f"reward_{name}" for name in weightless)]
    messages = {
        "kl_runaway": kl_runaway(history, params),
        "entropy_collapse": entropy_collapse(history),
        **{
            f"over_optimisation_{observer}": over_optimisation(history, f"objective/{observer}")
            for observer in observers
        },
        "length_drift": length_drift(history),
        "ratio_explosion": ratio_explosion(history, params),
        "negative_k3": negative_k3(history),
        "all_clipped": all_clipped(history),
    }
    return [Finding(name, message) for name, message in messages.items() if message]


def kl_runaway(history: History, params: RLParams) -> str | None:
    """The policy leaves the reference, and nothing holds it back."""
    kl = _column(history, "objective/kl")
    lengths = _column(history, "response/length_mean")
    if len(kl) < WINDOW or len(lengths) < WINDOW:
        return None
    recent = fmean(kl[-WINDOW:])
    a_token = recent / fmean(lengths[-WINDOW:])
    # Before the first rollout the policy is the reference.
    before = fmean(kl[-2 * WINDOW : -WINDOW] or [0.0])
    if params.kl_controller == "adaptive":
        runs_away = recent > KL_OVER_TARGET * params.kl_target and recent >= before
        held = f"rl.kl_target is {params.kl_target:g}"
        remedy = "Raise rl.kl_coef, lower rl.kl_horizon"
    else:
        growing = a_token > KL_A_TOKEN_GROWING and recent > KL_GROWTH * before
        runs_away = recent > KL_FAR and (a_token > KL_A_TOKEN or growing)
        held = f"rl.kl_coef is {params.kl_coef:g}"
        remedy = "Raise rl.kl_coef"
    if not runs_away:
        return None
    return (
        f"objective/kl is {recent:.3g} nats a response ({a_token:.2g} a token) over the last "
        f"{WINDOW} rollouts, {before:.3g} over those before, and {held}: the policy leaves the "
        "SFT model for texts on which the reward model was never trained. "
        f"{remedy}, or lower rl.learning_rate."
    )


def entropy_collapse(history: History) -> str | None:
    """The policy says always the same."""
    entropy = _column(history, "policy/entropy_avg")
    if len(entropy) < WINDOW:
        return None
    # The first rollout is the SFT model's own.
    first, recent = entropy[0], fmean(entropy[-WINDOW:])
    if not recent < ENTROPY_LEFT * first:
        return None
    return (
        f"policy/entropy_avg is {recent:.3g} nats a token over the last {WINDOW} rollouts, and it "
        f"was {first:.3g} in the first one: the policy says nearly always the same, and what it "
        "does not sample it can't learn. Raise rl.entropy_coef or rl.kl_coef, or lower "
        "rl.learning_rate."
    )


def over_optimisation(history: History, observer: str) -> str | None:
    """The reward rises while an observer, whom training does not follow, falls (Gao et al. 2022).

    Judged from the observer's best window on (arXiv 2210.10760, figure 1).
    """
    rewards, seen = _column(history, "objective/scores"), _column(history, observer)
    width = max(WINDOW, len(history) // SHARE)
    if min(len(rewards), len(seen)) < 2 * width:
        return None
    means = [fmean(seen[start : start + width]) for start in range(len(seen) - 2 * width + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    rise = fmean(rewards[-width:]) - fmean(rewards[best : best + width])
    fall = means[best] - fmean(seen[-width:])
    if not (rise > _noise(rewards, width) and fall > _noise(seen, width)):
        return None
    return (
        f"objective/scores rose by {rise:.3g} and {observer} fell by {fall:.3g} since rollouts "
        f"{best + 1} to {best + width}: the policy exploits the reward, which no longer measures "
        "what the observer does. Raise rl.kl_coef, or stop earlier with fewer rl.episodes."
    )


def length_drift(history: History) -> str | None:
    """Responses become much longer or shorter than the SFT model's."""
    lengths = _column(history, "response/length_mean")
    if len(lengths) < WINDOW:
        return None
    first, recent = lengths[0], lengths[-WINDOW:]
    # Each of the window, not its mean: one rollout of a few very long responses is no drift.
    if not (min(recent) > LENGTH_CHANGE * first or max(recent) < first / LENGTH_CHANGE):
        return None
    return (
        f"response/length_mean is {fmean(recent):.3g} tokens over the last {WINDOW} rollouts, and "
        f"it was {first:.3g} in the first one: the reward may pay for length alone. Compare "
        "reward_model/score_length_correlation, raise rl.kl_coef, or add a reward function for "
        "the length to rl.rewards."
    )


def ratio_explosion(history: History, params: RLParams) -> str | None:
    """The updates of one rollout take the policy far from the one that sampled it."""
    largest = history[-1].get("policy/ratio_max", 1.0)
    mean = history[-1].get("val/ratio", 1.0)
    low, high = 1 - params.cliprange, 1 + (params.cliprange_high or params.cliprange)
    # Drawn by the old policy, the ratio has the mean 1 whatever the new one is.
    if not (largest > RATIO_MAX or mean < low or mean > high):
        return None
    return (
        f"policy/ratio_max is {largest:.3g} and val/ratio {mean:.3g}, and rl.cliprange allows "
        f"{low:.3g} to {high:.3g}: the updates take the policy so far that its samples no longer "
        "describe it. Lower rl.learning_rate or rl.epochs, or set rl.target_kl; if "
        "val/decode_gap_max is large, sampling and training disagree instead."
    )


def negative_k3(history: History) -> str | None:
    """An estimate of the KL that can't be negative is."""
    k3 = history[-1].get("objective/kl_k3", 0.0)
    tokens = max(1.0, history[-1].get("response/length_mean", 1.0))
    if not k3 < -K3_ROUNDING * tokens:
        return None
    return (
        f"objective/kl_k3 is {k3:.3g} nats a response, and exp(-x) - 1 + x is never below 0: the "
        "log-probabilities of policy and reference are not those of the same tokens. Look for "
        "masks that are not aligned, and models that do not match; no setting mends this."
    )


def all_clipped(history: History) -> str | None:
    """No response ends by itself."""
    clipped = _column(history, "response/clipped_fraction")
    if len(clipped) < WINDOW or not (share := fmean(clipped[-WINDOW:])) >= CLIPPED:
        return None
    return (
        f"response/clipped_fraction is {share:.2f} over the last {WINDOW} rollouts: nearly all "
        "responses are cut before their end, and the treatment of rl.missing_eos decides their "
        "scores. Raise sampling.response_tokens, or look whether the demonstrations of SFT end "
        "with the end token."
    )


def _column(history: History, name: str) -> list[float]:
    return [metrics[name] for metrics in history if name in metrics]


def _noise(values: Sequence[float], width: int) -> float:
    """The difference of two windows' means that may be chance.

    The variance of a rollout is read from successive differences, in which a trend hardly counts:
    sigma^2 = mean((x_{i+1} - x_i)^2) / 2 (von Neumann 1941).
    """
    variance = fmean((after - before) ** 2 for before, after in pairwise(values)) / 2
    return STANDARD_ERRORS * math.sqrt(2 * variance / width)
