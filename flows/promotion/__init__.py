"""A challenger against the champion: the flow, who meets whom, and a person's word on it."""
