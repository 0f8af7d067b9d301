"""Turns stories into documents: chats that ask for them, questions about them, plain text.

Stands between the generator of stories (`grammar`) and the training text (`corpus`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from common_words import NOUNS, OTHERS, VERBS
from grammar import Story, generate_story, slot_words
from phrases import QUESTIONS, Template, load_phrases
from special_tokens import ASSISTANT, BOS, END_OF_TEXT, END_OF_TURN, USER

SYSTEM_SHARE = 0.15
SLOPPY_SHARE = 0.1
FAREWELL_SHARE = 0.1
OPEN_SHARE = 0.08

_SHAPES = {
    "story": 20,
    "request": 46,
    "questions": 16,
    "about": 6,
    "plain_questions": 4,
    "stray": 3,
    "another": 3,
    "smalltalk": 5,
}
# An unusual hero only comes when asked for by name.
_SHAPES_OF_UNUSUAL = {"request": 6, "questions": 2, "about": 1}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training document: a chat, or plain text when `turns` is empty."""

    stories: tuple[Story, ...]
    """Every story whose text stands in the document."""
    turns: tuple[Turn, ...] = ()
    plain: str = ""

    def text(self) -> str:
        """Returns the document with its special tokens, in the form of the chat template."""
        body = self.plain
        for turn in self.turns:
            body += f"<|{turn.role}|>{turn.content}{END_OF_TURN}"
        return f"{BOS}{body}{END_OF_TEXT}"


def chat_prompt(request: str) -> str:
    """Returns the text of a chat up to the place where the model answers `request`."""
    return f"{BOS}{USER}{request}{END_OF_TURN}{ASSISTANT}"


def _lines(section: str) -> tuple[Template, ...]:
    return load_phrases("requests")[section]


def _say(rng: random.Random, section: str, **words: str) -> str:
    return rng.choice(_lines(section)).text.format_map(words)


def _sloppy(rng: random.Random, request: str) -> str:
    """Sometimes returns the request without capitals and punctuation, as people type."""
    if rng.random() < SLOPPY_SHARE:
        return request.lower().rstrip(".!?")
    return request


def usable_templates(story: Story, section: str) -> list[Template]:
    """Returns the lines of a section ("qa" or "subject") that need only facts of the story."""
    phrases = load_phrases(story.plot)
    part = story.facts.get("cause") or story.facts.get("occasion")
    templates = [
        *load_phrases(QUESTIONS)[section],
        *phrases[section],
        *phrases.get(f"{section}.{part}", ()),
    ]
    return [t for t in templates if all(slot in story.facts for slot in t.slots)]


def _subject(rng: random.Random, story: Story, *, named: bool = False) -> str:
    templates = usable_templates(story, "subject")
    if named:
        templates = [t for t in templates if {"hero", "kind"} <= set(t.slots)]
    return rng.choice(templates).text.format_map(slot_words(story.facts, story.genders))


def draw_request(rng: random.Random, story: Story, *, named: bool = False) -> str:
    """Draws a user's request for a story.

    Args:
        rng: Source of the choice.
        story: The story to ask for.
        named: Whether the request must name the hero and the hero's kind.

    Returns:
        One message, such as "Tell me a story about a fox named Pip."
    """
    return _say(rng, "request", subject=_subject(rng, story, named=named))


def draw_questions(rng: random.Random, story: Story, num_questions: int) -> list[tuple[str, str]]:
    """Draws different questions about a story with their answers."""
    templates = usable_templates(story, "qa")
    words = slot_words(story.facts, story.genders)
    chosen = rng.sample(templates, min(num_questions, len(templates)))
    pairs = [template.text.format_map(words).split(" | ") for template in chosen]
    return [(question, answer) for question, answer in pairs]


def _story_turns(rng: random.Random, story: Story) -> list[Turn]:
    bare = story.is_usual and rng.random() < OPEN_SHARE
    request = (
        _say(rng, "open_request") if bare else draw_request(rng, story, named=not story.is_usual)
    )
    return [Turn("user", _sloppy(rng, request)), Turn("assistant", story.text)]


def _question_turns(rng: random.Random, story: Story) -> list[Turn]:
    turns = []
    for question, answer in draw_questions(rng, story, rng.randint(1, 4)):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _about_turns(rng: random.Random, story: Story) -> list[Turn]:
    [(question, answer)] = draw_questions(rng, story, 1)
    request = _say(rng, "about", story=story.text, question=question)
    return [Turn("user", request), Turn("assistant", answer), *_question_turns(rng, story)]


def _smalltalk_turns(rng: random.Random, story: Story) -> list[Turn]:
    """A greeting or a question beyond the model, an offer, and often the offered story."""
    words = slot_words(story.facts, story.genders)
    if rng.random() < 0.4:
        question, answer = _say(rng, "greeting", **words).split(" | ")
    else:
        noun, noun2 = rng.sample(NOUNS, 2)
        question = _say(rng, "unknown", noun=noun, noun2=noun2, verb=rng.choice(VERBS))
        question = question[0].upper() + question[1:]
        answer = _say(rng, "decline", **words)
    turns = [Turn("user", _sloppy(rng, question)), Turn("assistant", answer)]
    if rng.random() < 0.5:
        turns += [Turn("user", _say(rng, "yes")), Turn("assistant", story.text)]
    return turns


def _another_turns(rng: random.Random, first: Story, second: Story) -> list[Turn]:
    request = _say(rng, "again", subject=_subject(rng, second, named=True))
    turns = [*_story_turns(rng, first), Turn("user", request), Turn("assistant", second.text)]
    return turns


def _with_frame(rng: random.Random, turns: list[Turn]) -> tuple[Turn, ...]:
    """Sometimes puts a system message before a chat and a farewell after it."""
    if rng.random() < SYSTEM_SHARE:
        turns.insert(0, Turn("system", _say(rng, "system")))
    if rng.random() < FAREWELL_SHARE:
        question, answer = _say(rng, "farewell").split(" | ")
        turns += [Turn("user", question), Turn("assistant", answer)]
    return tuple(turns)


def _stray_text(rng: random.Random, story: Story) -> str:
    """Returns a story after a few common words or, without them, from somewhere in its middle.

    Teaches a model to find its way into a story from any beginning.
    """
    if rng.random() < 0.3:
        sentences = story.text.split(". ")
        return ". ".join(sentences[rng.randrange(len(sentences)) :])
    words = [
        rng.choice(rng.choice((NOUNS, VERBS, OTHERS, OTHERS))) for _ in range(rng.randint(1, 8))
    ]
    words[0] = words[0].capitalize()
    return f"{' '.join(words)}... {story.text}"


def generate_document(rng: random.Random, *, held_out: bool = False) -> Document:
    """Draws a training document.

    Args:
        rng: Source of every choice.
        held_out: Whether its heroes belong to the held-out split.

    Returns:
        The document; about two thirds are chats that ask for a story.
    """
    story = generate_story(rng, held_out=held_out)
    shapes = _SHAPES if story.is_usual else _SHAPES_OF_UNUSUAL
    [shape] = rng.choices(list(shapes), weights=list(shapes.values()))
    if shape == "story":
        return Document((story,), plain=story.text)
    if shape == "stray":
        return Document((story,), plain=_stray_text(rng, story))
    if shape == "plain_questions":
        pairs = draw_questions(rng, story, rng.randint(1, 3))
        lines = [f"Question: {question}\nAnswer: {answer}" for question, answer in pairs]
        return Document((story,), plain="\n".join((story.text, *lines)))
    if shape == "another":
        second = generate_story(rng, held_out=held_out)
        return Document((story, second), _with_frame(rng, _another_turns(rng, story, second)))
    if shape == "questions":
        turns = _story_turns(rng, story) + _question_turns(rng, story)
    elif shape == "about":
        turns = _about_turns(rng, story)
    elif shape == "smalltalk":
        turns = _smalltalk_turns(rng, story)
    else:
        turns = _story_turns(rng, story)
    return Document((story,), _with_frame(rng, turns))
