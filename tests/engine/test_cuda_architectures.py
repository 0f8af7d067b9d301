"""Every architecture on a GPU: error in bf16 beside that of `transformers`, and greedy tokens."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from architectures.checkpoints import random_model, write_folder
from architectures.fixed_configs import SMALL
from architectures.logit_error import measure, random_texts
from architectures.paged import run_greedily
from architectures.reference import Continuations, StepwiseReference
from greedy_reference import GreedyComparison
from mini_infer.config import EngineConfig
from mini_infer_engine.build import build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MAX_RATIO = 1.1
"""Our error in bf16 over that of `transformers`."""
NUM_SEEDS = 4
NUM_TOKENS = 64
PROMPT_LENS = [120, 70, 33, 1]


@pytest.mark.parametrize("architecture", SMALL)
def test_error_in_bf16_is_that_of_transformers(architecture: str) -> None:
    config = SMALL[architecture]()
    texts = random_texts(config.vocab_size, PROMPT_LENS, 16)
    parts = [
        part
        for seed in range(NUM_SEEDS)
        for part in measure(config, seed, texts, device="cuda", dtype=torch.bfloat16)
    ]
    errors = reduce(add, parts)
    assert errors.ratio <= MAX_RATIO, {name: errors.relative(name) for name in errors.squares}


@pytest.mark.parametrize("architecture", SMALL)
def test_greedy_tokens_in_float32_are_those_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    config = SMALL[architecture]()
    write_folder(random_model(config, 0), tmp_path)
    prompts = [text.prompt_ids for text in random_texts(config.vocab_size, PROMPT_LENS, 0)]
    reference = StepwiseReference(tmp_path)
    known = Continuations()
    comparison = GreedyComparison(known)
    outputs = {
        device: run_greedily(
            build_engine(
                EngineConfig(
                    model=str(tmp_path),
                    device=device,
                    dtype="float32",
                    kv_cache_tokens=2048,
                    max_num_seqs=4,
                    max_num_batched_tokens=50,
                )
            ),
            prompts,
            [NUM_TOKENS] * len(prompts),
        )
        for device in ("cpu", "cuda")
    }
    for index, prompt in enumerate(prompts):
        expected = reference.continue_greedily(prompt, NUM_TOKENS)
        known.add(expected)
        for device in outputs:
            comparison.add(prompt, expected.output_ids, outputs[device][index])
    comparison.check()
