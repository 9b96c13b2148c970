"""Making, loading and saving language models and scalar (reward, value) models."""
