"""Step judge: a second reward model from the other half of the judgements, to check the first."""

from tasks.reward_model import reward_model

judge = reward_model.with_options(name="judge")
"""The same training under another name, so that its results are found under that name."""
