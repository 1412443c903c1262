"""The exceptions whose messages are meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what the user gave: says what was given, what was expected and the remedy.

    The command line prints it as one line without a traceback and exits with `status`.
    """

    status = 2


class RunFailed(UserError):
    """What the user gave was in order, and still it cannot go on: says why, and the remedy."""

    status = 1


class Diverged(RunFailed):
    """Training has left the range of numbers; for a search, that is a result."""


class AgreedStop(KeyboardInterrupt):
    """Ctrl-C, once every rank has finished the same batch and knows of it."""
