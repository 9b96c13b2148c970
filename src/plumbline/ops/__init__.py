"""Pure tensor functions: masks, log-probabilities, KL, rewards, advantages."""
