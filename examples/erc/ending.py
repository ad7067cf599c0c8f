"""How a command ends: with a status, and in one line where something is wrong."""

from collections.abc import Callable

import click

from examples.erc.errors import InputError, TrainingError

INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 and the number of the signal."""


def guard(
    context: click.Context, work: Callable[[], None], again: str = "goes on from there"
) -> None:
    """End in one line, not in a traceback, whatever the user can do something about.

    Args:
        context: Of the command.
        work: What the command does.
        again: What the same command does after Ctrl-C.
    """
    try:
        work()
    except InputError as error:
        end(context, f"error: {error}", 2)
    except TrainingError as error:
        end(context, f"error: {error}", 1)
    except BrokenPipeError:  # nobody reads on, which click knows how to end
        raise
    except OSError as error:
        end(context, f"error: {error}; what was written before is kept", 1)
    except KeyboardInterrupt:
        end(
            context,
            f"\ninterrupted: what was saved is kept; the same command {again}",
            INTERRUPTED,
        )


def end(context: click.Context, line: str, status: int) -> None:
    """Say a last line to standard error, and leave with a status."""
    click.echo(line, err=True)
    context.exit(status)
