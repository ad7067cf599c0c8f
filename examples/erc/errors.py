"""The errors that the example pipelines tell a user in one line."""


class InputError(ValueError):
    """A mistake in what the user handed in: a file, a folder or an option.

    Raised before any work is done. The message says what is wrong, what was expected, what was
    received and how to mend it; the command line shows it alone and exits with status 2.
    """


class TrainingError(RuntimeError):
    """A training run that cannot go on, such as a loss that is no longer finite."""
