"""The shipped models: sizes, tokenizer, chat template, and agreement with transformers."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint import MODELS_DIR, load_checkpoint, save_checkpoint
from corpus import TokenStream, encode_corpus
from dialogue import Document, Turn, chat_prompt
from evaluate import (
    HeldOutPrompt,
    draw_prompts,
    find_in_training_text,
    names_subject,
    sample_stories,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama import SHAPES, Llama, LlamaShape
from recogniser import is_story
from scoring import score_stream
from special_tokens import BOS, BOS_ID, END_OF_TEXT, EOS_IDS, SPECIAL_TOKENS
from tokenizers import Tokenizer
from train import TrainingConfig, train

DEMO = MODELS_DIR / "demo"
DRAFT = MODELS_DIR / "demo-draft"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MEBIBYTE = 2**20

TINY = LlamaShape(
    hidden_size=32, intermediate_size=48, num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def demo() -> Llama:
    return load_checkpoint(DEMO)


def test_sizes_are_within_their_bounds(demo: Llama) -> None:
    draft = load_checkpoint(DRAFT)
    assert 3_000_000 <= demo.num_parameters() <= 8_000_000
    assert (DEMO / "model.safetensors").stat().st_size <= 16 * MEBIBYTE
    assert draft.num_parameters() <= demo.num_parameters() / 4
    assert (DRAFT / "model.safetensors").stat().st_size <= 4 * MEBIBYTE
    assert (demo.shape, draft.shape) == (SHAPES["demo"], SHAPES["demo-draft"])


def test_both_models_have_the_same_tokenizer() -> None:
    for name in TOKENIZER_FILES:
        assert (DEMO / name).read_bytes() == (DRAFT / name).read_bytes()


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == SHAPES["demo"].vocab_size
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [*range(6)]
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(EOS_IDS)
    assert tokenizer.encode("x").ids[0] == BOS_ID
    assert BOS_ID not in tokenizer.encode("x", add_special_tokens=False).ids


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def render_chat(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((DEMO / "chat_template.jinja").read_text())
    return template.render(
        messages=messages, bos_token=BOS, add_generation_prompt=add_generation_prompt
    )


def test_the_chat_template_writes_chats_as_training_did() -> None:
    chat = [("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hello.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    document = Document((), turns=tuple(Turn(*turn) for turn in chat))
    text = render_chat(messages, add_generation_prompt=False)
    assert text + END_OF_TEXT == document.text()
    assert render_chat(messages[1:2], add_generation_prompt=True) == chat_prompt("Hello!")


def test_the_chat_template_refuses_other_roles() -> None:
    with pytest.raises(TemplateError, match="expected role system, user or assistant, got tool"):
        render_chat([{"role": "tool", "content": "x"}], add_generation_prompt=False)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("folder", [DEMO, DRAFT], ids=["demo", "demo-draft"])
def test_transformers_loads_the_model_and_agrees(folder: Path, tokenizer: Tokenizer) -> None:
    import transformers

    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    auto_tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, a fox named Pip lived by the river."
    assert auto_tokenizer(text).input_ids == tokenizer.encode(text).ids
    message = {"role": "user", "content": "Hi"}
    chat = auto_tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert chat == chat_prompt("Hi")

    ids = torch.randint(0, 4096, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = theirs.eval()(ids).logits - load_checkpoint(folder)(ids)
    assert difference.abs().max() < 1e-4


def test_greedy_stories_for_held_out_requests_hold_together() -> None:
    prompts = draw_prompts(8, seed=3)
    stories = sample_stories(DEMO, prompts, temperature=0, seed=0)
    assert sum(map(is_story, stories)) >= 7
    assert all(map(names_subject, stories, prompts))


def test_the_subject_must_be_named_as_a_word() -> None:
    prompt = HeldOutPrompt("", "Pip", "fox")
    assert names_subject("Pip was a fox.", prompt)
    assert not names_subject("Pippa was a fox.", prompt)
    assert not names_subject("Pip was a firefox.", prompt)


def test_copies_of_training_stories_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate
    from corpus import document_at

    monkeypatch.setattr(evaluate, "NUM_TRAINING_DOCUMENTS", 50)
    [*_, story] = document_at(20).stories
    masked = evaluate.mask_people(story.text, story.facts)
    wanted = frozenset((story.text, masked, "Something else."))
    assert find_in_training_text(wanted, num_processes=1) == {story.text, masked}


def make_training_config(steps: int) -> TrainingConfig:
    return TrainingConfig(
        model="demo",
        steps=steps,
        batch_sequences=4,
        context_tokens=32,
        learning_rate=3e-3,
        warmup_steps=2,
        seed=0,
        documents=20,
        held_out_documents=4,
        device="cpu",
        use_compile=False,
        processes=1,
    )


def test_training_lowers_the_loss_and_repeats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = encode_corpus(tokenizer, 20, num_processes=1)
    config = make_training_config(steps=20)
    perplexities = []
    for _ in range(2):
        torch.manual_seed(config.seed)
        model = Llama(TINY)
        train(model, stream, config)
        save_checkpoint(model, tmp_path)
        perplexities.append(score_stream(load_checkpoint(tmp_path), stream).perplexity)
    assert perplexities[0] < 2500
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)


def test_scores_do_not_depend_on_padding(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = Llama(TINY)
    rng = random.Random(0)
    rows = [np.array(rng.choices(range(4096), k=k), dtype=np.uint16) for k in (9, 30, 17)]
    starts = np.array([0, 9, 39], dtype=np.int64)
    together = score_stream(model, TokenStream(np.concatenate(rows), starts))
    alone = [score_stream(model, TokenStream(row, starts[:1])) for row in sorted(rows, key=len)]
    np.testing.assert_allclose(
        together.losses, np.concatenate([scores.losses for scores in alone]), rtol=1e-4
    )


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = make_training_config(steps=100)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert max(rates) == pytest.approx(rates[1], rel=0.01)
    assert rates[0] == pytest.approx(config.learning_rate / 2, rel=0.01)
    assert rates[-1] < 0.03 * config.learning_rate


def test_heads_must_share_evenly() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 3 and 2"):
        LlamaShape(hidden_size=8, intermediate_size=8, num_layers=1, num_q_heads=3, num_kv_heads=2)
