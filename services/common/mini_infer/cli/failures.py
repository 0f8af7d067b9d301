"""What a person is told when a command fails: one sentence, whatever went wrong."""

from __future__ import annotations

from mini_infer.errors import ConfigError, MiniInferError


def sentence(error: Exception) -> str | None:
    """What to tell a person; None for a bug, which deserves its traceback."""
    if isinstance(error, ConfigError | MiniInferError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed here: `mini-infer doctor` says more"
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        return (
            f"expected text in {error.encoding.upper()} ({error.reason}): check the input, and "
            "the locale of the terminal"
        )
    explain = getattr(error, "format_message", None)  # what typer raises for a bad command line
    return f"{explain().rstrip('.')}; --help shows the usage" if explain else None
