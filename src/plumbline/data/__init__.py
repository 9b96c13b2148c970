"""From the user's files to validated, split, tokenised rows."""
