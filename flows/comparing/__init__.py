"""Finished runs side by side: which are meant, what is compared, and the pages of it."""
