"""The recogniser of the story grammar: tells whether a text is a coherent story, and why not.

It reads text, not plans. A text is parsed into told events by matching sentence patterns whose
slots admit only words of the lexicon; then the order of events must be one of a plot, every slot
must keep its value through the story, pronouns must fit, and what follows must follow from its
cause (the `BOUND` tables). It calls nothing of the generator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from lexicon import BOUND, DIFFERENT, FREE, GENDERED_KINDS, HE_NAMES, SHE_NAMES, article
from phrases import PLOTS, SHARED, fact_of, load_phrases

_ORDERS = {
    "lost": r"treasure outing loss\.(\w+) sad (search )?meet ask hint\.\2 found\.\2 thanks "
    r"after\.\2 end",
    "baking": r"wish\.(\w+) missing plan obstacle solve arrive cook give\.\2 (praise )?end",
    "rescue": r"walk call trouble (comfort )?remedy relief promise need favour (moral )?end",
    "sharing": r"find quarrel break (regret )?sorry mend turns (moral )?end",
    "fear": r"fear danger (shake )?resolve deed saved (admire )?change end",
    "noise": r"night guess (listen )?go reveal excuse laugh drink bed( pals)?",
    "garden": r"plant care problem neighbour fix grow harvest meal (moral )?end",
    "building": r"goal build failure despair meet advice improve success (moral )?end",
}
_ORDER_OF_PLOT = {
    plot: re.compile(rf"open (habit )?{order}( close)?") for plot, order in _ORDERS.items()
}

_NAME = r"[A-Z][a-z]+"
_WORD = r"[a-z]+"
_PRONOUN_PATTERNS = {"he": "he|she", "him": "him|her", "his": "his|her"}
_GENDERS = {"he": "he", "him": "he", "his": "he", "she": "she", "her": "she"}
_EVENT_SECTIONS_LEFT_OUT = ("qa", "subject")


class NotAStoryError(ValueError):
    """The text is not a story of the grammar; the message says why."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One sentence pattern: a template turned into a regular expression."""

    plot: str
    event: str
    regex: re.Pattern[str]
    groups: tuple[tuple[str, str], ...]
    """Group name and the slot that it stands for."""


@dataclass(frozen=True, slots=True)
class Parse:
    """What the recogniser read from an accepted text."""

    plot: str
    events: tuple[str, ...]
    facts: dict[str, str]


@cache
def _values_of(fact: str) -> tuple[str, ...]:
    """Returns every value that a slot may take, whatever its parent."""
    if fact in FREE:
        return FREE[fact]
    _, table = BOUND[fact]
    return tuple(dict.fromkeys(value for values in table.values() for value in values))


def _slot_pattern(slot: str) -> str:
    """Returns the regular expression of one slot, without its group."""
    plain = slot.lower().removeprefix("f") if fact_of(slot) == "friend" else slot.lower()
    if slot != "friend" and plain in _PRONOUN_PATTERNS:
        words = _PRONOUN_PATTERNS[plain].split("|")
        return "|".join(word.capitalize() if slot[0].isupper() else word for word in words)
    fact = fact_of(slot)
    if fact in ("hero", "friend"):
        return _NAME
    if fact == "kind":
        values = _WORD
    else:
        longest_first = sorted(_values_of(fact), key=len, reverse=True)
        values = "|".join(re.escape(value) for value in longest_first)
    return f"an? (?:{values})" if slot.startswith("a_") else values


def _compile(plot: str, event: str, text: str) -> Pattern:
    regex = ""
    groups = []
    for index, part in enumerate(re.split(r"{(\w+)}", text)):
        if index % 2 == 0:
            regex += re.escape(part)
        else:
            groups.append((f"g{index}", part))
            regex += f"(?P<g{index}>{_slot_pattern(part)})"
    return Pattern(plot, event, re.compile(regex + r"(?= |$)"), tuple(groups))


@cache
def _patterns() -> tuple[Pattern, ...]:
    return tuple(
        _compile(plot, event, template.text)
        for plot in (SHARED, *PLOTS)
        for event, templates in load_phrases(plot).items()
        if event.split(".")[0] not in _EVENT_SECTIONS_LEFT_OUT
        for template in templates
    )


def _read_events(text: str) -> Iterator[tuple[Pattern, re.Match[str]]]:
    """Yields the told events from left to right, the longest match at each place.

    Raises:
        NotAStoryError: If some part of the text matches no pattern.
    """
    position = 0
    while position < len(text):
        matches = [(p, m) for p in _patterns() if (m := p.regex.match(text, position))]
        if not matches:
            raise NotAStoryError(f"no event is told at: {text[position : position + 60]!r}")
        pattern, match = max(matches, key=lambda pair: pair[1].end())
        yield pattern, match
        position = match.end() + 1


def _bind(facts: dict[str, str], fact: str, value: str) -> None:
    """Sets a fact, or checks that it is what was told before."""
    told = facts.setdefault(fact, value)
    if told != value:
        raise NotAStoryError(f"{fact} was {told!r} and is now {value!r}")


def _bind_slot(facts: dict[str, str], slot: str, words: str) -> None:
    fact = fact_of(slot)
    if fact in ("hero", "friend") and slot != fact:
        _bind(facts, f"gender of {fact}", _GENDERS[words.lower()])
        return
    if slot.startswith("a_"):
        value = words.split(" ", 1)[1]
        if article(value) != words:
            raise NotAStoryError(f"expected {article(value)!r}, got {words!r}")
        words = value
    _bind(facts, fact, words)


def _check_people(facts: dict[str, str]) -> None:
    """Checks that both people are told of and that their names, kinds and pronouns agree."""
    for person, kind_slot in (("hero", "kind"), ("friend", "fkind")):
        name, kind = facts.get(person), facts.get(kind_slot)
        if name is None or kind is None:
            raise NotAStoryError(f"the story does not say who the {person} is")
        gender = facts.get(f"gender of {person}")
        expected = {GENDERED_KINDS.get(kind)} - {None}
        expected |= {"he"} if name in HE_NAMES else set()
        expected |= {"she"} if name in SHE_NAMES else set()
        if gender and expected and expected != {gender}:
            raise NotAStoryError(f"{name} the {kind} is called {gender!r}")


def _check_consequences(facts: dict[str, str]) -> None:
    """Checks every fact that must follow from another, and those that must differ."""
    for fact, (parent, table) in BOUND.items():
        if fact not in facts:
            continue
        # A text may leave the parent unsaid; then some one parent must allow what it says.
        parents = [facts[parent]] if parent in facts else list(table)
        if not any(facts[fact] in table.get(value, ()) for value in parents):
            raise NotAStoryError(f"{fact} {facts[fact]!r} does not follow from {parent} {parents}")
    for fact, other in DIFFERENT.items():
        if fact in facts and facts[fact] == facts.get(other):
            raise NotAStoryError(f"{fact} and {other} are both {facts[fact]!r}")


def parse_story(text: str) -> Parse:
    """Parses a story.

    Args:
        text: The whole story, one paragraph.

    Returns:
        Its plot, events and facts.

    Raises:
        NotAStoryError: If the text is not a whole, coherent story.
    """
    facts: dict[str, str] = {}
    events = []
    plots = set()
    for pattern, match in _read_events(text.strip()):
        events.append(pattern.event)
        plots.add(pattern.plot)
        for group, slot in pattern.groups:
            _bind_slot(facts, slot, match[group])
    plots.discard(SHARED)
    if len(plots) != 1:
        raise NotAStoryError(f"expected the events of one plot, got {sorted(plots)}")
    plot = plots.pop()
    if not _ORDER_OF_PLOT[plot].fullmatch(" ".join(events)):
        raise NotAStoryError(f"not the order of a {plot} story: {' '.join(events)}")
    _check_people(facts)
    _check_consequences(facts)
    return Parse(plot, tuple(events), facts)


def is_story(text: str) -> bool:
    """Tells whether `text` is a whole, coherent story of the grammar."""
    try:
        parse_story(text)
    except NotAStoryError:
        return False
    return True
