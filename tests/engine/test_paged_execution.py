"""The engine's steps through Triton's kernels against torch's own operations: the same logits.

On a CPU the kernels are interpreted, so models are tiny and steps run operation by operation; a
GPU runs the same kernels in `test_cuda_architectures.py`, with graphs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures.checkpoints import random_model, write_folder
from architectures.fixed_configs import SMALL
from architectures.paged import Texts, run_forced, shuffled_pool
from mini_infer import EngineConfig
from mini_infer_engine.build import Engine, build_engine
from mini_infer_engine.graph_sizes import row_sizes, size_for, token_sizes
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.loader import load_weights
from mini_infer_engine.model_runner import EagerForward, ModelRunner
from mini_infer_engine.models import MODELS
from mini_infer_engine.staged_ints import StagedInts
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_engine.execution import needs_rotation_lens  # noqa: E402
from mini_infer_engine.paged_inputs import PagedInputBuffers, PagedLimits  # noqa: E402
from mini_infer_kernels.kernel_set import triton_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="for the interpreter")

TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OVERRIDES: dict[str, dict[str, object]] = {
    "Phi3ForCausalLM": {"hidden_size": 128},  # heads of 32, of which 24 elements turn
    "Gemma3ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
}
FAST = "Gemma3ForCausalLM"
MAX_STEP_TOKENS = 24
NUM_BLOCKS = 24


def architectures() -> list[object]:
    """Two in every run; the others take as long again."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    """Makes an engine of a tiny model that runs on torch's own operations."""

    def make(architecture: str) -> Engine:
        config = SMALL[architecture]()
        sizes = {"layer_types": None, **TINY, **OVERRIDES.get(architecture, {})}
        config = type(config)(**{**config.to_dict(), **sizes})
        folder = tmp_path_factory.mktemp(architecture)
        write_folder(random_model(config, seed=1), folder)
        return build_engine(
            EngineConfig(
                model=str(folder),
                device="cpu",
                kv_cache_tokens=NUM_BLOCKS * 16,
                max_num_seqs=4,
                max_num_batched_tokens=MAX_STEP_TOKENS,
            )
        )

    return make


def with_triton(engine: Engine) -> Engine:
    """The same model in Triton, over a cache of its own shape."""
    served, spec = engine.served, engine.cache_size.spec
    backend = Backend(triton_kernels(), torch.float32, torch.device("cpu"))
    make_model = MODELS[served.config.architecture]
    model = make_model(served.config, backend, num_positions=served.max_model_len)
    load_weights(model, engine.config.model_folder)
    buffers = PagedInputBuffers(
        spec,
        PagedLimits(
            max_num_seqs=4,
            max_num_tokens=MAX_STEP_TOKENS,
            max_num_blocks=NUM_BLOCKS,
            token_sizes=(8, 20),  # so that some steps are padded, and some are not
        ),
        num_q_heads=served.config.num_q_heads,
        windows=served.config.windows,
        needs_rotation_lens=needs_rotation_lens(served),
    )
    runner = engine.runner
    forward = EagerForward(model)
    return replace(
        engine,
        model=model,
        runner=ModelRunner(model, forward, runner.cache, buffers, runner._sampler),
    )


def texts(vocab_size: int) -> Texts:
    """A long prompt that is cut up, one of a block, one token; they end at different steps."""
    generator = random.Random(3)

    def ids(length: int) -> list[int]:
        return [generator.randrange(vocab_size) for _ in range(length)]

    return [(ids(45), ids(2)), (ids(16), ids(4)), (ids(1), ids(3))]


@pytest.mark.parametrize("architecture", architectures())
def test_logits_equal_those_of_torchs_operations(
    made: Callable[[str], Engine], architecture: str
) -> None:
    engine = made(architecture)
    logits = []
    for each in (engine, with_triton(engine)):
        pool = shuffled_pool(each, NUM_BLOCKS, seed=2)
        forward = EagerForward(each.model)
        logits.append(run_forced(each, forward, texts(TINY["vocab_size"]), pool, MAX_STEP_TOKENS))
    for expected, got in zip(*logits, strict=True):
        assert (got.text, got.start) == (expected.text, expected.start)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 64, 100, 256, 300, 700])
def test_every_step_has_a_graph_size(most: int) -> None:
    sizes = row_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for num_rows in range(1, most + 1):
        size = size_for(num_rows, sizes)
        assert size is not None
        assert num_rows <= size <= max(num_rows + 31, 2 * num_rows)


@pytest.mark.parametrize("most", [1, 16, 100, 256, 700, 2048])
def test_prompts_are_padded_by_a_quarter_at_most(most: int) -> None:
    sizes = token_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert size_for(most + 1, sizes) is None
    for num_tokens in range(1, most + 1):
        size = size_for(num_tokens, sizes)
        assert size is not None
        assert num_tokens <= size <= num_tokens + max(15, num_tokens / 4)


def test_staged_parts_do_not_overlap() -> None:
    staged = StagedInts(64, torch.device("cpu"))
    for lengths in ([1, 2, 5], [9], [3, 3, 3, 3, 4]):
        parts = [[100 * index + j for j in range(n)] for index, n in enumerate(lengths)]
        staged.stage([torch.tensor(part).numpy() for part in parts])
        views = staged.views(lengths)
        assert [view.tolist() for view in views] == parts
        assert all(view.data_ptr() % 16 == views[0].data_ptr() % 16 for view in views)


def test_padding_is_of_no_row_whatever_was_staged_before(made: Callable[[str], Engine]) -> None:
    engine = made(FAST)
    spec = engine.cache_size.spec
    limits = PagedLimits(max_num_seqs=4, max_num_tokens=16, max_num_blocks=4, token_sizes=(16,))
    buffers = PagedInputBuffers(
        spec,
        limits,
        num_q_heads=engine.served.config.num_q_heads,
        windows=engine.served.config.windows,
    )
    cache = engine.runner.cache
    capacity = buffers._staged.capacity
    for make, sizes in ((buffers.padding_rows, row_sizes(4)), (buffers.padding_tokens, [16])):
        for size in sizes:
            buffers._staged.stage([np.full(capacity, -77)])
            inputs = make(size, cache)
            inputs.attention.prepare()
            assert inputs.token_ids.tolist() == [0] * size
            assert inputs.attention.slot_mapping.tolist() == [-1] * size
            assert inputs.attention.positions.tolist() == [0] * size
            assert not inputs.attention.tokens.context_lens.any()
