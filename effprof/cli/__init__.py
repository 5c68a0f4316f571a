"""The command line: one file per command, arguments -> one call -> one report."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from effprof.errors import EffprofError, UsageError, unknown

COMMANDS = (
    "estimate",
    "compare",
    "recommend",
    "trace",
    "probe",
    "validate",
    "train",
    "report",
    "bench",
    "methods",
    "models",
    "gpus",
    "doctor",
)

_FIRST = """Three things to try:
  effprof estimate --model 1b --method lowrank    which cards hold it, and why
  effprof probe --model 9m --method galore        a short real run beside that
  effprof train --model 9m --method lowrank --steps 100
`effprof --help` lists every command; --debug shows an error's traceback."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"effprof {version('effprof')}")
        raise typer.Exit


def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """effprof: what fits, what it is worth, does reality agree, and then train."""
    if context.invoked_subcommand is None:
        typer.echo(_FIRST)


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The app with these commands: building one instead of all is a third of a short run."""
    app = typer.Typer(
        name="effprof",
        help="Tells which pretraining method fits your GPU, proves it by measuring, and trains.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(main)
    for name in names:
        module = importlib.import_module(f"effprof.cli.{name}")
        app.command(module.NAME, epilog=module.EPILOG)(module.command)
    return app


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    first = arguments[0] if arguments else ""
    try:
        app = build([first] if first in COMMANDS else COMMANDS)
        for stream in (sys.stdout, sys.stderr):  # of an encoding that lacks a sign or two
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if sys.stdout is None:  # `effprof … >&-`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        result = app(arguments, standalone_mode=False, prog_name="effprof")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except EffprofError as error:
        if debug:
            raise
        say(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return _no_output()  # the reader has had enough: `effprof methods | head`
    except OSError as error:
        if debug or error.errno != errno.ENOSPC:
            raise
        say(EffprofError("The output cannot be written: no space left.", "Write it elsewhere."))
        return _no_output()
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a bad option
            raise
        say(_usage(str(error.format_message()), arguments))
        return 2


def _usage(message: str, arguments: list[str]) -> EffprofError:
    """typer's complaint with our hint: the nearest command, or where the options are listed."""
    first = next((argument for argument in arguments if not argument.startswith("-")), "")
    if first and first not in COMMANDS:
        return unknown("command", first, COMMANDS, "`effprof --help` lists them.")
    return UsageError(message, f"effprof {first} --help lists the options.")


def _no_output() -> int:
    """Let the interpreter end without flushing into a closed or full stream once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def say(error: EffprofError) -> None:
    """An error as people read it: what happened, and what to type."""
    sys.stderr.write(f"Error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"Hint:  {error.hint}\n")
