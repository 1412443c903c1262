"""The one exception whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what the user gave: says what was given, what was expected and the remedy.

    The command line prints it as one line without a traceback and exits with status 2.
    """
