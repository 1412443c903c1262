"""The exceptions whose messages are meant for the user."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave; names what was given, what was expected and the remedy.

    The command line prints it as one line without a traceback and exits with `status`.
    """

    status = 2

    def __init__(self, message: str) -> None:
        # torch puts the traceback of a loader process before the message
        traceback = r"(?s)^Caught .* in DataLoader worker process .*\n[\w.]+: (.*?)\n?$"
        super().__init__(re.sub(traceback, r"\1", message))


class RunFailed(UserError):
    """A failure although the input was right; names the reason and the remedy."""

    status = 1


class Diverged(RunFailed):
    """Training has diverged, which a search takes for a result."""


class AgreedStop(KeyboardInterrupt):
    """Ctrl-C, raised once every rank has finished the same batch."""


def reason_of(error: Exception) -> str:
    """Return an error's message as one short line, or its kind if it has none."""
    return " ".join(str(error).split())[:200].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def as_user_error(problem: str, remedy: str) -> Iterator[None]:
    """Replace any exception but a `UserError` by one; libraries raise nearly every type for a bad file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{problem} ({type(error).__name__}: {reason_of(error)}); {remedy}") from error
