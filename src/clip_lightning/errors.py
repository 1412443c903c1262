"""The exceptions whose messages are meant for the user."""


class UserError(ValueError):
    """A mistake in what the user gave; names what was given, what was expected and the remedy.

    The command line prints it as one line without a traceback and exits with `status`.
    """

    status = 2


class RunFailed(UserError):
    """A failure although the input was right; names the reason and the remedy."""

    status = 1


class Diverged(RunFailed):
    """Training has diverged, which a search takes for a result."""


class AgreedStop(KeyboardInterrupt):
    """Ctrl-C, raised once every rank has finished the same batch."""
