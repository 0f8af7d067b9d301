"""Measures a shipped model: do its stories hold together, and are they its own?

    python models/training/evaluate.py

Samples stories for held-out requests with the engine, checks them with the recogniser and against
the whole training text (produced again from its seed), and scores held-out documents. Prints one
line per figure with its bound and exits with 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from checkpoint import MODELS_DIR, load_checkpoint
from corpus import NUM_TRAINING_DOCUMENTS, document_at, encode_corpus, iterate_chunks
from dialogue import chat_prompt, draw_request
from grammar import generate_story
from mini_infer import EngineConfig, LLMEngine, SamplingParams
from recogniser import NotAStoryError, parse_story
from scoring import score_stream
from tokenizers import Tokenizer

MIN_ACCEPTED = 0.85
MIN_SUBJECT_NAMED = 0.95
MAX_IN_TRAINING_TEXT = 0.05
MIN_DRAFT_AGREEMENT = 0.60

_MASKED_FACTS = ("hero", "kind", "friend", "fkind")


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A request whose hero stands in no training document."""

    text: str
    hero: str
    kind: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure and the bound that it must keep."""

    name: str
    value: float
    at_least: float = float("-inf")
    at_most: float = float("inf")

    @property
    def is_kept(self) -> bool:
        """Tells whether the value lies within its bounds."""
        return self.at_least <= self.value <= self.at_most

    def line(self) -> str:
        """Returns the figure as one printed line."""
        bound = ""
        if self.at_least > float("-inf"):
            bound = f"(at least {self.at_least:.2f})"
        if self.at_most < float("inf"):
            bound = f"(at most {self.at_most:.2f})"
        return f"{self.name:<44} {self.value:8.4f}  {bound:<16} {'' if self.is_kept else 'MISSED'}"


def draw_prompts(num_prompts: int, seed: int) -> list[HeldOutPrompt]:
    """Draws chat prompts that ask for a story about a held-out hero by name and kind."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_prompts):
        story = generate_story(rng, held_out=True)
        text = chat_prompt(draw_request(rng, story, named=True))
        prompts.append(HeldOutPrompt(text, story.facts["hero"], story.facts["kind"]))
    return prompts


def sample_stories(
    folder: Path, prompts: list[HeldOutPrompt], *, temperature: float, seed: int
) -> list[str]:
    """Samples one story for each prompt with the engine, the n-th one with seed + n."""
    params = [
        SamplingParams(temperature=temperature, top_p=1.0, max_tokens=400, seed=seed + index)
        for index in range(len(prompts))
    ]
    with LLMEngine(EngineConfig(model=str(folder))) as engine:
        texts = [prompt.text for prompt in prompts]
        outputs = engine.generate(texts, params, add_special_tokens=False)
    return [output.text for output in outputs]


def names_subject(story: str, prompt: HeldOutPrompt) -> bool:
    """Tells whether a story names the hero and the hero's kind as words."""
    return all(re.search(rf"\b{word}\b", story) for word in (prompt.hero, prompt.kind))


def mask_people(story: str, facts: dict[str, str]) -> str:
    """Returns the story with names and kinds taken out: equal for stories that differ in them."""
    for slot in _MASKED_FACTS:
        story = story.replace(facts[slot], slot)
    return story.replace(" an ", " a ")


def _matches_in_chunk(chunk: tuple[int, int], wanted: frozenset[str]) -> set[str]:
    found: set[str] = set()
    for index in range(*chunk):
        for story in document_at(index).stories:
            found |= wanted & {story.text, mask_people(story.text, story.facts)}
    return found


def find_in_training_text(wanted: frozenset[str], num_processes: int) -> set[str]:
    """Returns those of `wanted` that equal a training story, as told or with people masked."""
    chunks = list(iterate_chunks(NUM_TRAINING_DOCUMENTS))
    with ProcessPoolExecutor(num_processes) as pool:
        return set().union(*pool.map(_matches_in_chunk, chunks, repeat(wanted)))


def measure_stories(folder: Path, args: argparse.Namespace) -> list[Figure]:
    """Samples stories and returns the figures about them."""
    prompts = draw_prompts(args.samples, args.seed)
    stories = sample_stories(folder, prompts, temperature=args.temperature, seed=args.seed)
    masked = []
    for prompt, story in zip(prompts, stories, strict=True):
        try:
            masked.append(mask_people(story, parse_story(story).facts))
        except NotAStoryError as error:
            print(f"rejected: {error}\n  asked: {prompt.text}\n  told: {story}")
    named = sum(map(names_subject, stories, prompts))
    known = find_in_training_text(frozenset((*stories, *masked)), args.processes)
    copied = sum(story in known for story in stories)
    copied_masked = sum(story in known for story in masked)
    total = len(stories)
    return [
        Figure("accepted by the recogniser", len(masked) / total, at_least=MIN_ACCEPTED),
        Figure("subject named", named / total, at_least=MIN_SUBJECT_NAMED),
        Figure("in the training text", copied / total, at_most=MAX_IN_TRAINING_TEXT),
        Figure(
            "in it but for names and kinds", copied_masked / total, at_most=MAX_IN_TRAINING_TEXT
        ),
    ]


def measure_likelihood(folder: Path, draft: Path, args: argparse.Namespace) -> list[Figure]:
    """Scores held-out documents with both models and returns the figures about them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream = encode_corpus(tokenizer, args.documents, args.processes, held_out=True)
    scores = score_stream(load_checkpoint(folder), stream)
    draft_scores = score_stream(load_checkpoint(draft), stream)
    agreement = float((scores.greedy_ids == draft_scores.greedy_ids).mean())
    return [
        Figure("held-out perplexity", scores.perplexity),
        Figure("held-out perplexity of the draft", draft_scores.perplexity),
        Figure("greedy choices shared with the draft", agreement, at_least=MIN_DRAFT_AGREEMENT),
    ]


def main() -> int:
    """Runs the evaluation and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODELS_DIR / "demo")
    parser.add_argument("--draft", type=Path, default=MODELS_DIR / "demo-draft")
    parser.add_argument("--samples", type=int, default=200, help="stories to sample")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--documents", type=int, default=500, help="held-out documents to score")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    started_s = time.perf_counter()
    figures = [
        *measure_stories(args.model, args),
        *measure_likelihood(args.model, args.draft, args),
    ]
    for figure in figures:
        print(figure.line())
    print(f"measured in {time.perf_counter() - started_s:.0f} s")
    return 0 if all(figure.is_kept for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
