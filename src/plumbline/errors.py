"""The errors that a user can cause and mend; everything else is a bug."""


class PlumblineError(Exception):
    """An error whose message alone tells the user what to do next."""


class ParamsError(PlumblineError):
    """The params do not describe an experiment (exit code 2)."""


class DataError(PlumblineError):
    """The data is missing, unreadable or breaks a rule (exit code 2)."""


class MachineError(PlumblineError):
    """The machine cannot hold the run: no room, no permission (exit code 2)."""


class TrainingError(PlumblineError):
    """A step cannot go on: a loss is not finite, the disk is full (exit code 1)."""
