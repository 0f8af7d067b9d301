"""Reads the phrase files: the sentences in which the events of a story may be told.

A phrase file has sections, `[event]`, with one template per line and slots in braces. Generator and
recogniser share these sentences as data; which events make a story, and in which order, is
written down in each of them separately.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PHRASES_DIR = Path(__file__).with_name("phrases")
PLOTS = ("lost", "baking", "rescue", "sharing", "fear", "noise", "garden", "building")
SHARED = "shared"
QUESTIONS = "questions"

_SLOT = re.compile(r"{(\w+)}")
_HERO_PRONOUNS = ("he", "him", "his")
_FRIEND_PRONOUNS = ("fhe", "fhim", "fhis")


@dataclass(frozen=True, slots=True)
class Template:
    """One way to tell an event."""

    text: str
    """The sentence with `{slot}` where a word goes."""
    slots: tuple[str, ...]
    """The facts that it needs, without articles and pronouns, in order of appearance."""


def fact_of(slot: str) -> str:
    """Returns the fact that a slot shows: "a_kind" shows "kind", "Fhis" shows "friend"."""
    if slot.lower() in _HERO_PRONOUNS:
        return "hero"
    if slot.lower() in _FRIEND_PRONOUNS:
        return "friend"
    return slot.removeprefix("a_")


def parse_template(text: str) -> Template:
    """Returns the template of one line of a phrase file."""
    slots = dict.fromkeys(fact_of(slot) for slot in _SLOT.findall(text))
    return Template(text, tuple(slots))


@cache
def load_phrases(name: str) -> dict[str, tuple[Template, ...]]:
    """Returns event -> templates of the phrase file `name`, which is a plot or `SHARED`."""
    events: dict[str, list[Template]] = {}
    event = ""
    for line in (PHRASES_DIR / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            event = line.strip("[]")
            events[event] = []
        elif line and not line.startswith("#"):
            events[event].append(parse_template(line))
    return {event: tuple(templates) for event, templates in events.items()}
