"""A tracked run made again from its commit, params and data, and what agrees with it."""
