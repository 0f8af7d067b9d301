"""The generator of the story grammar: draws the facts of a story and tells them.

A plot is a sequence of events. Facts are drawn when a chosen sentence first needs them, so the
facts of a story are exactly what its text tells. Everything is a function of the random generator
that is passed in. Chats around the stories are made in `dialogue`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from common_words import NOUNS
from lexicon import (
    BOUND,
    CODAS,
    DIFFERENT,
    FREE,
    GENDERED_KINDS,
    HE_NAMES,
    KINDS,
    ONSETS,
    PRONOUNS,
    SHE_NAMES,
    VOWELS,
    article,
)
from phrases import PLOTS, SHARED, Template, load_phrases

RARE_NAME_SHARE = 0.2
RARE_KIND_SHARE = 0.08
OPTIONAL_SHARE = 0.6
HELD_OUT_ONE_IN = 10

# A "?" marks an event that may be left out; {cause} and {occasion} are facts of the plot.
_EVENTS = {
    "lost": "open habit? treasure outing loss.{cause} sad search? meet ask hint.{cause} "
    "found.{cause} thanks after.{cause} end close?",
    "baking": "open habit? wish.{occasion} missing plan obstacle solve arrive cook "
    "give.{occasion} praise? end close?",
    "rescue": "open habit? walk call trouble comfort? remedy relief promise need favour moral? "
    "end close?",
    "sharing": "open habit? find quarrel break regret? sorry mend turns moral? end close?",
    "fear": "open habit? fear danger shake? resolve deed saved admire? change end close?",
    "noise": "open habit? night guess listen? go reveal excuse laugh drink bed pals? close?",
    "garden": "open habit? plant care problem neighbour fix grow harvest meal moral? end close?",
    "building": "open habit? goal build failure despair meet advice improve success moral? "
    "end close?",
}

_LISTED_NAMES = frozenset((*HE_NAMES, *SHE_NAMES))


@dataclass(frozen=True, slots=True)
class Story:
    """A told story and what it is about."""

    plot: str
    facts: dict[str, str]
    """Slot -> value, for every slot that the text shows and the plan of the plot."""
    genders: dict[str, str]
    """"hero" and "friend" -> "he" or "she"."""
    text: str

    @property
    def is_usual(self) -> bool:
        """Tells whether the hero's name and kind are words of the lexicon."""
        return self.facts["hero"] in _LISTED_NAMES and self.facts["kind"] in KINDS


def is_held_out(hero: str, kind: str) -> bool:
    """Tells whether stories about this hero are kept out of the training text.

    The split is by a hash of name and kind, so that it depends on nothing else: no training
    document has a held-out hero.
    """
    digest = hashlib.blake2b(f"{hero} the {kind}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _invent_word(rng: random.Random) -> str:
    """Returns a word of one to three random syllables, such as "zorro" or "branuth"."""
    word = ""
    for _ in range(rng.choice((1, 2, 2, 3))):
        word += rng.choice(ONSETS) + rng.choice(VOWELS)
    return word + rng.choice(CODAS) if rng.random() < 0.7 else word


def _draw_kind(rng: random.Random) -> str:
    """Returns what a hero is, sometimes something unusual or without a meaning.

    Unusual kinds, like invented names, teach a model to take over any word from a request.
    """
    if rng.random() >= RARE_KIND_SHARE:
        return rng.choice(KINDS)
    return rng.choice(NOUNS) if rng.random() < 0.5 else _invent_word(rng)


def _draw_listed_name(rng: random.Random, gender: str) -> str:
    return rng.choice(HE_NAMES if gender == "he" else SHE_NAMES)


def _draw_name(rng: random.Random, gender: str) -> str:
    if rng.random() < RARE_NAME_SHARE:
        name = _invent_word(rng).capitalize()
        if name not in _LISTED_NAMES:
            return name
    return _draw_listed_name(rng, gender)


def _draw_gender(rng: random.Random, kind: str) -> str:
    return GENDERED_KINDS.get(kind) or rng.choice(("he", "she"))


def _draw_people(rng: random.Random, held_out: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Returns facts and genders of a hero of the wanted split and of a different friend."""
    while True:
        kind = _draw_kind(rng)
        gender = _draw_gender(rng, kind)
        hero = _draw_name(rng, gender)
        if is_held_out(hero, kind) == held_out:
            break
    while True:
        fkind = rng.choice(KINDS)
        friend_gender = _draw_gender(rng, fkind)
        friend = _draw_listed_name(rng, friend_gender)
        if friend != hero and fkind != kind:
            break
    facts = {"hero": hero, "kind": kind, "friend": friend, "fkind": fkind}
    return facts, {"hero": gender, "friend": friend_gender}


def _draw_fact(rng: random.Random, slot: str, facts: dict[str, str]) -> None:
    """Sets `facts[slot]`, after the fact that it depends on, if it is not yet set."""
    if slot in facts:
        return
    choices = FREE.get(slot, ())
    if slot in BOUND:
        parent, table = BOUND[slot]
        _draw_fact(rng, parent, facts)
        choices = table[facts[parent]]
    other = facts.get(DIFFERENT.get(slot, ""))
    value = rng.choice(choices)
    while value == other:
        value = rng.choice(choices)
    facts[slot] = value


def slot_words(facts: dict[str, str], genders: dict[str, str]) -> dict[str, str]:
    """Returns what stands in a text for every slot form: articles, pronouns, capitals."""
    words = dict(facts)
    for slot, value in facts.items():
        words[f"a_{slot}"] = article(value)
    for person, prefix in (("hero", ""), ("friend", "f")):
        for form, word in PRONOUNS[genders[person]].items():
            words[prefix + form] = word
            words[(prefix + form).capitalize()] = word.capitalize()
    return words


def _choose_templates(rng: random.Random, plot: str, facts: dict[str, str]) -> list[Template]:
    """Chooses the events of a story and one sentence for each."""
    phrases = load_phrases(plot)
    shared = load_phrases(SHARED)
    chosen = []
    for event in _EVENTS[plot].format_map(facts).split():
        name = event.removesuffix("?")
        if name == event or rng.random() < OPTIONAL_SHARE:
            chosen.append(rng.choice(phrases.get(name) or shared[name]))
    return chosen


def generate_story(rng: random.Random, *, held_out: bool = False) -> Story:
    """Draws a story.

    Args:
        rng: Source of every choice.
        held_out: Whether the hero belongs to the held-out split.

    Returns:
        The story; its text is one paragraph of about 60 to 250 tokens.
    """
    plot = rng.choice(PLOTS)
    facts, genders = _draw_people(rng, held_out)
    if plot == "lost":
        _draw_fact(rng, "cause", facts)
    if plot == "baking":
        _draw_fact(rng, "occasion", facts)
    templates = _choose_templates(rng, plot, facts)
    for template in templates:
        for slot in template.slots:
            _draw_fact(rng, slot, facts)
    words = slot_words(facts, genders)
    text = " ".join(template.text.format_map(words) for template in templates)
    return Story(plot, facts, genders, text)
