"""A run of one experiment: its flow, what each step takes, its plan, and what it leaves to see."""
