"""The options of `generate` and `chat` that say how to sample and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import typer

from mini_infer.cli.options import Notation, field_options, take_given, with_options
from mini_infer.sampling_params import RepetitionDetection, SamplingParams
from mini_infer.structured_output import StructuredOutput


def takes_sampling(
    *, omit: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the fields of `SamplingParams` and `StructuredOutput` as options.

    Args:
        omit: Fields that are no options of the command.

    Returns:
        A decorator that makes a function for typer; the command gets the options that were given
        as its first argument, as the clients take them.
    """
    options = [
        *field_options(SamplingParams, {"structured_output", *omit}, _NOTATIONS),
        *field_options(StructuredOutput, omit, _NOTATIONS),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(ctx: typer.Context, **arguments: Any) -> None:
            sampling = take_given(ctx, arguments, options)
            if "logit_bias" in sampling:
                sampling["logit_bias"] = dict(sampling["logit_bias"])
            command(sampling, **arguments)

        return with_options(run, command, options)

    return decorate


def _read_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise typer.BadParameter(f"expected ID=NUMBER such as 42=-1.5, got {text}") from None


def _read_repetition(text: str) -> RepetitionDetection:
    try:
        *min_period, max_period, num_repeats = map(int, text.split(":"))
        (least,) = min_period or (1,)
    except ValueError:
        expected = "expected [MIN:]MAX:REPEATS such as 64:4"
        raise typer.BadParameter(f"{expected}, got {text}") from None
    return RepetitionDetection(max_period=max_period, min_period=least, num_repeats=num_repeats)


def _read_text(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read the file {text[1:]}: {error}") from None


_TEXT = Notation("TEXT|@FILE", _read_text, "With @, the name of a file that holds it.")
_NOTATIONS = {
    "stop": Notation("TEXT", str, is_repeated=True),
    "logit_bias": Notation("ID=NUMBER", _read_bias, is_repeated=True),
    "repetition_detection": Notation(
        "[MIN:]MAX:REPEATS",
        _read_repetition,
        "Written as tokens of the shortest (else 1) and the longest pattern, and how often.",
    ),
    "json_schema": _TEXT,
    "grammar": _TEXT,
}
