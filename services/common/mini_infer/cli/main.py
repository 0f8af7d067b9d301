"""The `mini-infer` command: its sub-commands, and one sentence for whatever goes wrong.

Neither torch nor gRPC is loaded before a command needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from mini_infer import __version__
from mini_infer.cli import processes
from mini_infer.cli.chat import chat
from mini_infer.cli.demo import demo
from mini_infer.cli.doctor import doctor
from mini_infer.cli.failures import sentence
from mini_infer.cli.generate import generate
from mini_infer.cli.serve import serve

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def mini_infer(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve a large language model over gRPC, and talk to it."""
    if version:
        typer.echo(f"mini-infer {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


for command in (
    demo,
    serve,
    processes.gateway,
    processes.tokenizer,
    processes.engine,
    generate,
    chat,
    doctor,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line; a failure is one sentence on stderr and exit code 2.

    Args:
        arguments: What follows the program's name; None takes the process's own.
    """
    try:
        exit_code = app(arguments, prog_name="mini-infer", standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        explanation = sentence(error)
        if explanation is None:
            raise
        print(f"mini-infer: {explanation}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
