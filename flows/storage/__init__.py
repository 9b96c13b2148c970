"""What is kept on disk: what nothing refers to any more, and whether the rest is whole."""
