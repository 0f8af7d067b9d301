"""The story grammar: what it generates is recognised, what is damaged is not."""

import random
from collections.abc import Callable

import pytest
from corpus import NUM_TRAINING_DOCUMENTS, document_at
from dialogue import draw_questions, draw_request
from grammar import Story, generate_story, is_held_out
from phrases import PLOTS
from recogniser import NotAStoryError, is_story, parse_story

NUM_STORIES = 500


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    rng = random.Random(0)
    return [generate_story(rng, held_out=index % 2 == 1) for index in range(NUM_STORIES)]


def test_every_generated_story_is_recognised_with_its_facts(stories: list[Story]) -> None:
    for story in stories:
        parse = parse_story(story.text)
        assert parse.plot == story.plot
        for fact, value in parse.facts.items():
            if not fact.startswith("gender of "):
                assert story.facts[fact] == value


def test_every_plot_occurs(stories: list[Story]) -> None:
    assert {story.plot for story in stories} == set(PLOTS)


def test_stories_have_the_length_of_a_short_story(stories: list[Story]) -> None:
    words = [len(story.text.split()) for story in stories]
    assert min(words) >= 60
    assert max(words) <= 250


def test_stories_seldom_repeat(stories: list[Story]) -> None:
    assert len({story.text for story in stories}) == len(stories)


def sentences_swapped(rng: random.Random, story: Story) -> str:
    sentences = story.text.split(". ")
    index = rng.randrange(len(sentences) - 2)
    sentences[index], sentences[index + 1] = sentences[index + 1], sentences[index]
    return ". ".join(sentences)


def sentences_shuffled(rng: random.Random, story: Story) -> str:
    sentences = story.text.split(". ")
    rng.shuffle(sentences)
    return ". ".join(sentences)


def hero_renamed_halfway(rng: random.Random, story: Story) -> str:
    middle = story.text.rindex(story.facts["hero"])
    return story.text[:middle] + story.text[middle:].replace(story.facts["hero"], "Bartholomew")


def truncated(rng: random.Random, story: Story) -> str:
    sentences = story.text.split(". ")
    return ". ".join(sentences[: rng.randint(1, len(sentences) - 3)]) + "."


def cut_inside_a_word(rng: random.Random, story: Story) -> str:
    return story.text[: rng.randint(20, len(story.text) - 2)].rstrip(" .")


def foreign_sentence_added(rng: random.Random, story: Story) -> str:
    sentences = story.text.split(". ")
    sentences.insert(rng.randrange(1, len(sentences)), "The train was late again")
    return ". ".join(sentences)


def sentence_told_twice(rng: random.Random, story: Story) -> str:
    sentences = story.text.split(". ")
    index = rng.randrange(1, len(sentences) - 2)
    return ". ".join([*sentences[:index], sentences[index], *sentences[index:]])


def word_dropped(rng: random.Random, story: Story) -> str:
    words = story.text.split()
    del words[rng.randrange(len(words))]
    return " ".join(words)


def ends_like_another_story(rng: random.Random, story: Story) -> str:
    other = generate_story(rng)
    half = len(story.text) // 2
    return (
        story.text[: story.text.index(". ", half) + 2]
        + other.text[other.text.index(". ", len(other.text) // 2) + 2 :]
    )


@pytest.mark.parametrize(
    "mutate",
    [
        sentences_swapped,
        sentences_shuffled,
        hero_renamed_halfway,
        truncated,
        cut_inside_a_word,
        foreign_sentence_added,
        sentence_told_twice,
        word_dropped,
        ends_like_another_story,
    ],
)
def test_damaged_stories_are_rejected(
    stories: list[Story], mutate: Callable[[random.Random, Story], str]
) -> None:
    rng = random.Random(1)
    damaged = [text for story in stories[:150] if (text := mutate(rng, story)) != story.text]
    rejected = sum(not is_story(text) for text in damaged)
    assert rejected >= 0.97 * len(damaged)


@pytest.mark.parametrize(
    ("cause", "foreign"),
    [
        ("And there it was, caught in the reeds beside the mill.", "stream"),
        ("And there it was, lying in the nest of the magpie.", "magpie"),
    ],
)
def test_an_ending_that_does_not_follow_from_its_cause_is_rejected(
    cause: str, foreign: str
) -> None:
    text = (
        "Once upon a time, a shy fox named Pip lived in a small house by the river. "
        "More than anything, Pip loved his red kite. One sunny morning, Pip took the kite to "
        "the hill. A gust of wind caught the kite and carried it off. Pip was very sad without "
        'the kite. Then he met Lily the hen. "Have you seen my red kite?" asked Pip. "Did the '
        'wind take it?" asked Lily. "Then it must be in a tree." {found} "Thank you, Lily!" '
        "said Pip. After that Pip tied the kite to a string on windy days. Pip and Lily were "
        "friends ever after."
    )
    assert is_story(text.format(found="And there it was, hanging in the top of an elm."))
    assert foreign not in text
    with pytest.raises(NotAStoryError, match="not the order"):
        parse_story(text.format(found=cause))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("an elm", "a elm", "expected 'an elm'"),
        ("his red kite", "her red kite", "gender of hero"),
        ("Lily the hen", "Lily the fox", "fkind and kind are both 'fox'"),
        ("my red kite", "my blue kite", "colour was 'red'"),
        ("tied the kite", "tied the drum", "object was 'kite'"),
    ],
)
def test_the_reason_for_a_rejection_is_told(old: str, new: str, reason: str) -> None:
    text = (
        "Pip was a shy fox who lived in a small house by the river. More than anything, Pip "
        "loved his red kite. One sunny morning, Pip took the kite to the hill. A gust of wind "
        "caught the kite and carried it off. Pip was very sad without the kite. Then he met Lily "
        'the hen. "Have you seen my red kite?" asked Pip. "Did the wind take it?" asked Lily. '
        '"Then it must be in a tree." And there it was, hanging in the top of an elm. "Thank '
        'you, Lily!" said Pip. After that Pip tied the kite to a string on windy days. Pip never '
        "forgot that day."
    )
    assert is_story(text)
    with pytest.raises(NotAStoryError, match=reason):
        parse_story(text.replace(old, new))


@pytest.mark.parametrize(
    "text", ["", "Hello.", "Once upon a time there was a fox.", "\u4f60\u597d"]
)
def test_other_texts_are_no_stories(text: str) -> None:
    assert not is_story(text)


def test_training_documents_have_no_held_out_hero() -> None:
    rng = random.Random(2)
    for _ in range(500):
        index = rng.randrange(NUM_TRAINING_DOCUMENTS)
        for story in document_at(index).stories:
            assert not is_held_out(story.facts["hero"], story.facts["kind"])
        for story in document_at(index, held_out=True).stories:
            assert is_held_out(story.facts["hero"], story.facts["kind"])


def test_a_document_is_a_function_of_its_index() -> None:
    assert document_at(17) == document_at(17)
    assert document_at(17) != document_at(18)
    assert document_at(17) != document_at(17, held_out=True)


def test_requests_and_questions_are_about_the_story(stories: list[Story]) -> None:
    rng = random.Random(3)
    for story in stories:
        request = draw_request(rng, story, named=True)
        assert story.facts["hero"] in request
        assert story.facts["kind"] in request
        for question, answer in draw_questions(rng, story, 3):
            assert question.endswith("?")
            assert answer.endswith(".")
            assert "{" not in question + answer
