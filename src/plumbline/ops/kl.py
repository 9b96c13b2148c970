"""KL divergence from the reference: Monte-Carlo estimators and the coefficient's controller.

J. Schulman, "Approximating KL divergence", 2020: k1, k2 and k3 estimate KL(policy || reference)
from tokens drawn by the policy.
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate KL(policy || reference) a token, in nats.

    k1 = logp - logp_ref;  k2 = k1^2 / 2;  k3 = exp(-k1) - 1 + k1.

    Args:
        logprobs: [B, T], of the policy that drew the tokens.
        ref_logprobs: [B, T], of the reference.
        estimator: k1 is unbiased, k2 has less variance, k3 has both and is never negative.
    """
    k1 = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return k1
        case "k2":
            return 0.5 * k1 * k1
        case "k3":
            # expm1 keeps the digits that exp(-k1) - 1 loses near 0.
            return (-k1).expm1() + k1
    raise ValueError(f"estimator: expected k1, k2 or k3, got {estimator!r}")


class FixedKLController:
    """A KL coefficient that stays as it is."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """Do nothing: the coefficient is fixed."""


class AdaptiveKLController:
    """A KL coefficient that steers the KL of a response to a target.

    beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon
    (Ziegler et al. 2019, arXiv 1909.08593, section 2.2, with the factor n / horizon a batch).
    """

    def __init__(self, kl_coef: float, target: float, horizon: int) -> None:
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Move the coefficient after `episodes` responses of mean KL `kl` (nats a response)."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * episodes / self.horizon
