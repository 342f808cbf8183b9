"""The exceptions that reach a user as a sentence instead of a traceback."""


class InputError(ValueError):
    """A mistake in what the user gave us: a file, a field or an argument.

    The message is one sentence that names the file, the field and the remedy. Commands print it and exit with code 2.
    """


class StoppedError(Exception):
    """A signal stopped the work where it can be continued; the message, one sentence, says how. Commands exit with
    128 + ``signal_number``."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class EndedError(Exception):
    """The work ended with another process of it; the message, which may be empty, says what is not said elsewhere.
    Commands exit with ``code``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
