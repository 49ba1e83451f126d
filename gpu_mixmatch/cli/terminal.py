"""What stands between a command and the person who gave it: lines, progress, choices and errors.

Everything is in terms of options. Paths are printed as they are, whatever brackets they hold, and
of several processes rank 0 alone speaks, but for errors of their own.
"""

import errno
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from gpu_mixmatch._ranks import is_launched, rank
from gpu_mixmatch.recipes.distributed import is_of_first_rank
from gpu_mixmatch.recipes.train import DivergenceError

WRONG_INPUT, BUG, DIVERGED, INTERRUPTED, TERMINATED = 2, 1, 3, 130, 143

console = Console()

# arguments of functions whose options have other names
_OPTION_OF = {
    "num_workers": "workers",
    "num_labels": "labels",
    "num_augmentations": "k",
    "name": "dataset",
}


def say(line: str) -> None:
    """Print a line as it is: no markup is read in it, and it is not broken."""
    if rank() == 0:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def printable(line: str) -> str:
    """Return a line with escapes for what a terminal would act on or cannot show.

    Names of files may hold line ends, codes that move the cursor, and bytes that are no text.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in line
    )


def choice(names: Sequence[str], text: str) -> Any:
    """Return an option that takes one of some names, which help and completion show."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"must be one of {', '.join(names)}, got {value!r}")
        return value

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option(
        help=text, metavar=f"[{'|'.join(names)}]", callback=check, autocompletion=complete
    )


@contextmanager
def progress() -> Iterator[Progress]:
    """Show bars at a terminal; elsewhere nothing, where a command prints lines instead."""
    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal or rank() > 0
    ) as bars:
        yield bars


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keep back the lines that native decoders print, coloured and without the name of a file.

    Every file that does not decode is named by ours. If anything else fails, they are shown.
    """
    sys.stderr.flush()
    printed = os.dup(2)
    stderr = sys.stderr
    with tempfile.TemporaryFile() as kept:
        try:
            if _is_file_2(stderr):
                sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            os.dup2(kept.fileno(), 2)
            yield
        except Exception as error:
            if _code_of(error) == BUG:
                kept.seek(0)
                os.write(printed, kept.read())
            raise
        finally:
            os.dup2(printed, 2)
            os.close(printed)
            if sys.stderr is not stderr:
                sys.stderr.close()
                sys.stderr = stderr


def _is_file_2(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 2)
    except (OSError, AttributeError, ValueError):  # io.UnsupportedOperation is both
        return False


class Terminated(KeyboardInterrupt):
    """SIGTERM came; it ends a command as Ctrl-C does."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, so that files are whole and the command has its last word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked
            os._exit(TERMINATED)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the code that shells expect of a command that a signal ended."""
    return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED


def this_command(*more: str) -> str:
    """Return the command line that is running, with options that it may lack."""
    given = sys.argv[1:]
    words = ["gpu-mixmatch", *given, *(word for word in more if word not in given)]
    return shlex.join(words)


class Commands(TyperGroup):
    """Commands that end in one line and a code where something outside is wrong.

    2 is wrong input, 3 a run that diverged, 130 Ctrl-C, 143 SIGTERM, and 1 an error that nobody
    expected, with its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with _warnings_in_lines():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            if rank() == 0:
                typer.echo("stopped", err=True)
            raise typer.Exit(exit_code(interrupt)) from interrupt
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has gone
            command = self.commands.get(ctx.invoked_subcommand or "")
            code = _code_of(error)
            if code is None:
                raise
            if not is_of_first_rank(error):
                where = f" on rank {os.environ.get('RANK')}" if is_launched() else ""
                if code == BUG:
                    traceback.print_exception(error)
                    text = "this is a bug of gpu-mixmatch, please report it with the lines above"
                else:
                    text = in_options(one_line(error), command)
                typer.echo(f"error{where}: {printable(text)}", err=True)
            raise typer.Exit(code) from error


def _code_of(error: Exception) -> int | None:
    """Return the exit code of an error; None for those of the command line's own parser."""
    if isinstance(error, DivergenceError):
        return DIVERGED
    if hasattr(error, "format_message"):  # a UsageError, which Typer shows
        return None
    if isinstance(error, NotImplementedError | RecursionError):
        return BUG
    if isinstance(error, ValueError | ImportError | RuntimeError | OSError | MemoryError):
        return WRONG_INPUT
    # of a wrong argument, in words of ours
    return WRONG_INPUT if isinstance(error, TypeError) and " must " in str(error) else BUG


def one_line(error: BaseException) -> str:
    """Return what an error says, and what was noted on its way, without line ends."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):  # of a worker process
        lines = [re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1])]
    elif len(lines) > 3:  # torch adds the stack of its own code
        lines = lines[:1]
    return " ".join([*lines, *(f"({note})" for note in getattr(error, "__notes__", ()))])


def in_options(text: str, command: Any) -> str:
    """Let a message speak of options of a command in place of arguments of functions."""
    options = {
        parameter.name: max(parameter.opts, key=len)
        for parameter in getattr(command, "params", ())
        if parameter.param_type_name == "option"
    }
    arguments = {name: option for name, option in options.items() if name}
    arguments |= {name: options[own] for name, own in _OPTION_OF.items() if own in options}
    for name, option in arguments.items():
        if "_" in name:  # no word of a sentence
            text = re.sub(rf"(?<![\w./'\"=-]){name}(?![\w/'\"=(-])", option, text)
        else:  # the subject of a clause, but for the labels of a data set
            text = re.sub(
                rf"(?:^|(?<=; )|(?<=got )){name}(?= must (?!hold at least)|: .* in the checkpoint)",
                option,
                text,
            )
    return text


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Show warnings as lines, without the place in the code that gave them."""
    show: Callable[..., None] = warnings.showwarning

    def line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            typer.echo(f"warning: {printable(str(message))}", err=True)
        else:
            show(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = line
        yield
