"""RLHF as declared, cached, tracked experiments: the library, free of any framework."""
