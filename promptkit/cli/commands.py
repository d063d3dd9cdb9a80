"""The application: one sentence and an exit code for every error, and an end at once
when it is stopped or nobody reads on.
"""

import atexit
import io
import os
import sys
import warnings

import typer
from typer.core import TyperGroup

from promptkit.cli.console import say
from promptkit.errors import InputError
from promptkit.workers import WorkerError, stop_on_signals

_UsageError = typer.BadParameter.__base__  # click's, or typer's own copy of it
_SIGPIPE = 13


class Commands(TyperGroup):
    """Turns errors that a reader can act on into one sentence and an exit code."""

    def invoke(self, ctx):
        """Run the command: exit code 2 for bad input, 1 for what failed under way, 128
        and its number for a signal.
        """
        _said.clear()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: say(f"Warning: {message}")
                return super().invoke(ctx)
        except InputError as error:
            say(f"Error: {error}")
            raise typer.Exit(2) from None
        except _UsageError as error:
            if not error.format_message():  # a group without a command shows its help
                raise
            where = error.ctx.command_path if error.ctx else "promptkit"
            say(f"Error: {error.format_message().rstrip('.')}; see '{where} --help'")
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise typer.Exit(128 + _SIGPIPE) from None
        except (OSError, WorkerError) as error:  # a full disk, a lost cluster
            say(f"Error: {error}")
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            say(
                f"Error: the package {error.name} is missing; install it with: pip"
                " install 'promptkit[all]'"
            )
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            last_words()
            raise typer.Exit(getattr(error, "code", 130)) from None


app = typer.Typer(
    cls=Commands,
    name="promptkit",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help=(
        "Prompt learning for vision-language models: train, test, reproduce the papers."
    ),
    epilog=(
        "Begin with [bold]promptkit run coop --data pets[/]: CoOp on the embedded"
        " benchmark, in seconds."
    ),
)


def main():
    """Entry point of the console script."""
    stop_on_signals(last_words)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and not stream.isatty():
            setattr(sys, name, _readable(stream, number))
    try:
        try:
            app()
        except SystemExit as done:
            code = done.code
        sys.stdout.flush()
        if not _said:
            atexit._run_exitfuncs()
    except KeyboardInterrupt as error:  # before or after the command itself
        last_words()
        code = getattr(error, "code", 130)
    except SystemExit as done:
        code = done.code
    sys.stderr.flush()
    # Taking torch apart would take seconds, in which no signal is answered.
    os._exit(code or 0)


_said = []


def last_words():
    """Say, once, that the command was stopped."""
    if not _said:
        _said.append(True)
        say(
            "Interrupted; what was finished is stored, and the same command goes on"
            " from there."
        )


class _Pipe(io.FileIO):
    """An output whose reader may leave, as ``head`` does: the process ends quietly."""

    def write(self, data):
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise SystemExit(128 + _SIGPIPE) from None


def _readable(stream, number):
    stream.flush()
    pipe = io.BufferedWriter(_Pipe(number, "w", closefd=False))
    return io.TextIOWrapper(
        pipe,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )
