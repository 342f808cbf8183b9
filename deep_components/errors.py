"""The one exception type that reaches a user as a sentence instead of a traceback."""


class InputError(ValueError):
    """A mistake in what the user gave us: a file, a field or an argument.

    The message is one sentence that names the file, the field and the remedy. Commands print it and exit with code 2.
    """
