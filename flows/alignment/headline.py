"""The numbers that a run is judged by, with their labels."""

HEADLINE = (
    "eval/win_rate",
    "eval/win_rate_low",
    "eval/win_rate_high",
    "eval/gold_win_rate",
    "eval/judge_win_rate",
    *(
        f"eval/{model}/{name}"
        for model in ("sft", "policy")
        for name in ("score", "gold", "judge", "distinct_2", "length_mean")
    ),
    "eval/policy/kl",
    "reward_model/accuracy",
    "judge/accuracy",
    "dpo/held_out_accuracy",
    "rl/warnings",
)
"""What the run of a pipeline has in MLflow: few enough for a table of runs to be read."""


def headline_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of a run that its row in MLflow's table shows; the steps' runs have all."""
    return {name: metrics[name] for name in HEADLINE if name in metrics}


def headline(metrics: dict[str, float]) -> list[tuple[str, float, float]]:
    """The metrics in which the two models are compared: label, SFT's value, policy's value."""
    rows = {
        "reward-model score": "score",
        "gold score": "gold",
        "judge's score": "judge",
        "KL to SFT (nats a response)": "kl",
        "length (tokens)": "length_mean",
        "distinct-1": "distinct_1",
        "distinct-2": "distinct_2",
    }
    return [
        (label, metrics[f"eval/sft/{key}"], metrics[f"eval/policy/{key}"])
        for label, key in rows.items()
        if f"eval/sft/{key}" in metrics
    ]


def estimates(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """The comparisons that have a 95% interval: label, and "estimate [low, high]"."""
    names = {
        "win rate over SFT": "eval/win_rate",
        "gain in the reward model's score": "eval/score_gain",
        "gain in the gold score": "eval/gold_gain",
        "gain in the judge's score": "eval/judge_gain",
        "reward-model accuracy": "reward_model/accuracy",
        "judge's accuracy": "judge/accuracy",
    }
    shown = []
    for label, name in names.items():
        if name in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            shown.append((label, f"{metrics[name]:.3f} [{low:.3f}, {high:.3f}]"))
    return shown
