"""Command-line options made from dataclass fields, so that no field is listed twice.

A field's type, default and line in the `Attributes:` of its class become the option's type,
shown default and help.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_UNITS = {
    "_s": "SECONDS",
    "_ms": "MILLISECONDS",
    "_bytes": "BYTES",
    "_gib": "GIB",
    "_tokens": "TOKENS",
}
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}


@dataclass(frozen=True, slots=True)
class Notation:
    """How the values of a field are written, where their type does not say so.

    Attributes:
        metavar: The form.
        parse: Reads one value.
        hint: More help, behind the field's own.
        is_repeated: Whether the field holds several values.
    """

    metavar: str
    parse: Callable[[str], Any]
    hint: str = ""
    is_repeated: bool = False


def option(
    name: str,
    annotation: Any,
    help_text: str,
    default: Any = None,
    *,
    metavar: str | None = None,
    hidden: bool = False,
    negatable: bool = False,
    parse: Callable[[str], Any] | None = None,
) -> inspect.Parameter:
    """An option as a keyword parameter of a function that typer runs."""
    flag = name.replace("_", "-")
    is_worth_showing = default is not None and default is not False and default not in ("", [])
    info = typer.Option(
        default,
        f"--{flag}/--no-{flag}" if negatable else f"--{flag}",
        metavar=metavar,
        help=help_text,
        show_default=is_worth_showing,
        hidden=hidden,
        parser=parse,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation
    )


def field_options(
    dataclass_type: type[DataclassInstance],
    omit: Collection[str] = (),
    notations: Mapping[str, Notation] | None = None,
) -> list[inspect.Parameter]:
    """An option for every field of a dataclass.

    Args:
        dataclass_type: Whose fields.
        omit: Fields that are no options.
        notations: By field, how its values are written.
    """
    hints = get_type_hints(dataclass_type)
    help_texts = attribute_docs(dataclass_type)
    options = []
    for each in fields(dataclass_type):
        help_text, notation = help_texts[each.name], (notations or {}).get(each.name)
        if each.name in omit:
            continue
        if notation is not None:
            options.append(_noted_option(each.name, help_text, notation))
        else:
            options.append(_field_option(each.name, hints[each.name], each.default, help_text))
    return options


def attribute_docs(documented: type) -> dict[str, str]:
    """Reads the `Attributes:` of a class's docstring, as text by name."""
    _, _, section = (inspect.getdoc(documented) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def take_given(
    ctx: typer.Context, arguments: dict[str, Any], options: Iterable[inspect.Parameter]
) -> dict[str, Any]:
    """Takes the options out of the arguments; returns those that were on the command line."""
    given = {}
    for name in (each.name for each in options):
        value = arguments.pop(name)
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[name] = value
    return given


def with_options(
    run: Callable[..., None],
    command: Callable[..., None],
    options: Sequence[inspect.Parameter],
) -> Callable[..., None]:
    """Shows `run` to typer as `command`, with options in place of its first argument."""
    context, *_ = inspect.signature(run, eval_str=True).parameters.values()
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([context, *own, *options])  # type: ignore[attr-defined]
    return run


def _noted_option(name: str, help_text: str, notation: Notation) -> inspect.Parameter:
    hints = (help_text, notation.hint, "May be repeated." if notation.is_repeated else "")
    return option(
        name,
        list[str] if notation.is_repeated else str | None,
        " ".join(filter(None, hints)),
        [] if notation.is_repeated else None,
        metavar=notation.metavar,
        parse=notation.parse,
    )


def _field_option(name: str, hint: Any, default: Any, help_text: str) -> inspect.Parameter:
    kind, is_repeated = _element_type(hint)
    if kind is bool:
        return option(name, bool, help_text, default, negatable=True)
    unit = next((text for end, text in _UNITS.items() if name.endswith(end)), None)
    metavar = unit or _METAVARS[kind]
    if is_repeated:
        return option(
            name,
            list[kind],  # type: ignore[valid-type]
            f"{help_text} May be repeated.",
            list(default or ()),
            metavar=metavar,
        )
    annotation = kind | None if default is None else kind
    return option(name, annotation, help_text, default, metavar=metavar)


def _element_type(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether a field holds several of it."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) in (tuple, Sequence):
        return get_args(hint)[0], True
    return hint, False
