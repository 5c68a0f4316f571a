"""The command line: one file per command, arguments -> one call -> one report."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from effprof.cli import estimate, methods, models, probe, train
from effprof.errors import EffprofError

app = typer.Typer(
    name="effprof",
    help="Tells which pretraining method fits your GPU, proves it with a measurement, and trains.",
    add_completion=True,
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (estimate, probe, train, methods, models):
    app.command(module.NAME, epilog=module.EPILOG)(module.command)

_FIRST = """Three things to try:
  effprof estimate --model 1b --method lowrank     what it needs, and on which cards it fits
  effprof probe --model 9m --method galore         a short real run, held against the estimate
  effprof train --model 9m --method lowrank --steps 100
`effprof --help` lists every command."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"effprof {version('effprof')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """effprof: what fits, what it is worth, does reality agree, and then train."""
    context.obj = {"debug": debug}
    if context.invoked_subcommand is None:
        typer.echo(_FIRST)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="effprof")
        return result if isinstance(result, int) else 0
    except EffprofError as error:
        if "--debug" in arguments:
            raise
        say(error)
        return error.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a bad option
            raise
        sys.stderr.write(f"Error: {error.format_message()}\n")
        sys.stderr.write(
            f"Hint:  effprof {arguments[0] if arguments else ''} --help lists the options.\n"
        )
        return 2


def say(error: EffprofError) -> None:
    """An error as people read it: what happened, and what to type."""
    sys.stderr.write(f"Error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"Hint:  {error.hint}\n")
