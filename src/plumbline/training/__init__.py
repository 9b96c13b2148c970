"""The three training loops: SFT, reward model, RL."""
