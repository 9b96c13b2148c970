"""Comparing models on held-out prompts, and drawing what was learned."""
