"""How far a model in a half-width type is from itself in float32: ours, and that of `transformers`.

The weights are made in the half-width type, so float32 has the same ones and what is measured is
the arithmetic alone. Prompts are prefilled as a whole, then some given tokens are decoded one at a
time, the same way everywhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architectures.checkpoints import random_model, write_folder
from architectures.paged import recorded, run_forced
from mini_infer.config import EngineConfig
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.build import build_engine
from transformers import AutoModelForCausalLM, PretrainedConfig

OURS = "ours"
ATTENTIONS = ("eager", "sdpa")
"""Ways in which `transformers` computes attention."""
BLOCK_SIZE = 16


@dataclass
class LogitErrors:
    """Sums over rows of logits; several measurements add up.

    Attributes:
        squares: By who computed: the squared norms of the differences from float32.
        reference_squares: The squared norms of the float32 rows.
        num_rows: Rows.
    """

    squares: dict[str, float] = field(default_factory=dict)
    reference_squares: float = 0.0
    num_rows: int = 0

    def __add__(self, other: LogitErrors) -> LogitErrors:
        """The sums of both."""
        names = self.squares.keys() | other.squares.keys()
        return LogitErrors(
            {name: self.squares.get(name, 0) + other.squares.get(name, 0) for name in names},
            self.reference_squares + other.reference_squares,
            self.num_rows + other.num_rows,
        )

    def add(self, expected: torch.Tensor, computed: Mapping[str, torch.Tensor]) -> None:
        """Counts rows of float32 logits, and what became of them elsewhere."""
        self.num_rows += len(expected)
        self.reference_squares += _square(expected)
        for name, rows in computed.items():
            self.squares[name] = self.squares.get(name, 0) + _square(rows - expected)

    def relative(self, name: str) -> float:
        """The norm of all of someone's differences over that of all float32 logits."""
        return (self.squares[name] / self.reference_squares) ** 0.5

    @property
    def ratio(self) -> float:
        """Our error over that of `transformers`, in its better way."""
        theirs = [self.relative(name) for name in self.squares if name != OURS]
        return self.relative(OURS) / min(theirs)


@dataclass(frozen=True)
class Text:
    """Ids to prefill, and those to decode after them."""

    prompt_ids: list[int]
    decoded_ids: list[int]


def random_texts(vocab_size: int, prompt_lens: Sequence[int], num_decodes: int) -> list[Text]:
    """Ids from a fixed seed."""
    generator = torch.Generator().manual_seed(len(prompt_lens))
    texts = []
    for length in prompt_lens:
        ids = torch.randint(vocab_size, (length + num_decodes,), generator=generator).tolist()
        texts.append(Text(ids[:length], ids[length:]))
    return texts


@torch.inference_mode()
def measure(
    config: PretrainedConfig,
    seed: int,
    texts: Sequence[Text],
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[LogitErrors, LogitErrors]:
    """Compares all ways of computing a random model's logits with float32.

    Args:
        config: The model.
        seed: Of its weights.
        texts: What it reads.
        device: Where everything is computed.
        dtype: The half-width type.

    Returns:
        Of the prompts' positions, and of the decoded ones.
    """
    model = random_model(config, seed, dtype=dtype, device=device)
    computed = {OURS: _ours(model, texts, device, dtype)}
    for attention in ATTENTIONS:
        # What soft caps scores has but one way.
        if attention == "eager" or model._supports_sdpa:
            model.set_attn_implementation(attention)
            computed[attention] = _theirs(model, texts)
    model.set_attn_implementation("eager")
    with _no_shortened_products():
        reference = _theirs(_in_float32(model, device), texts)
    prefilled, decoded = LogitErrors(), LogitErrors()
    for index, text in enumerate(texts):
        split = [len(text.prompt_ids), len(text.decoded_ids)]
        rows = {name: found[index].split(split) for name, found in computed.items()}
        for part, errors in enumerate((prefilled, decoded)):
            expected = reference[index].split(split)[part]
            errors.add(expected, {name: parts[part] for name, parts in rows.items()})
    return prefilled, decoded


def _square(rows: torch.Tensor) -> float:
    return float(rows.double().square().sum())


def _in_float32(model: Any, device: str) -> Any:
    """The same weights in a model that was made in float32, buffers and all."""
    with torch.device(device):
        wide = AutoModelForCausalLM.from_config(
            model.config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def _theirs(model: Any, texts: Sequence[Text]) -> list[torch.Tensor]:
    """[positions, vocab_size] float32 for each text."""
    found = []
    for text in texts:
        ids = torch.tensor([text.prompt_ids], device=model.device)
        output = model(ids, use_cache=True)
        rows = [output.logits[0].float()]
        for token_id in text.decoded_ids:
            ids = torch.tensor([[token_id]], device=model.device)
            output = model(ids, past_key_values=output.past_key_values, use_cache=True)
            rows.append(output.logits[0].float())
        found.append(torch.cat(rows))
    return found


def _ours(model: Any, texts: Sequence[Text], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Likewise, by our loader and runner; all texts at once."""
    lengths = [len(text.prompt_ids) + len(text.decoded_ids) + 1 for text in texts]
    with tempfile.TemporaryDirectory() as name:
        write_folder(model, Path(name))
        engine = build_engine(
            EngineConfig(
                model=name,
                device=device,
                dtype=str(dtype).removeprefix("torch."),
                block_size=BLOCK_SIZE,
                kv_cache_tokens=sum(lengths) + len(lengths) * BLOCK_SIZE,
                max_num_seqs=len(texts),
                max_model_len=max(lengths),
            )
        )
    # A last token, whose own logits are not asked for, so that all given ones are computed.
    forced = [(text.prompt_ids, [*text.decoded_ids, 0]) for text in texts]
    pool = BlockPool(engine.runner.cache.num_blocks, BLOCK_SIZE)
    found = [torch.empty(length - 1, model.config.vocab_size) for length in lengths]
    found = [rows.to(model.device) for rows in found]
    for part in run_forced(engine, recorded(engine), forced, pool, sum(lengths)):
        found[part.text][part.start : part.start + len(part.logits)] = part.logits
    return found


@contextmanager
def _no_shortened_products() -> Iterator[None]:
    """Products of float32 in float32, whatever the process prefers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
