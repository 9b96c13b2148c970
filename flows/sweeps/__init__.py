"""An experiment at many points: the flow of a sweep, its plan, its points and their processes."""
