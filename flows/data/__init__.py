"""Data sets: their check without a run, and their import."""
