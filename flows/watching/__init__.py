"""The look whether data has changed since it was trained on, and what it announces."""
