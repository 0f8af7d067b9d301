"""Triton's sampling against the references: on a GPU, or small in Triton's interpreter.

The same tokens of the same noise; where float32 and float64 differ, the difference has to be a
tie within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch
from mini_infer_kernels.reference.philox import gumbel_noise
from mini_infer_kernels.sampling_kernels import (
    NON_FINITE,
    NOTHING_ALLOWED,
    OK,
    REFERENCE_SAMPLING,
    DrawControls,
    TokenCounts,
)
from sampling_cases import Flags, Restriction, controls_of, exact_row
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels.sampling import choose  # noqa: E402
from mini_infer_kernels.sampling_kernels import triton_sampling  # noqa: E402
from triton_noise import noise_of_words  # noqa: E402

TRITON = triton_sampling()
NEAR_RACE = 1e-5
ON_CPU = DEVICE.type == "cpu"

needs_gpu = pytest.mark.skipif(ON_CPU, reason="no CUDA device")

RESTRICTIONS = [
    Restriction(0.0),
    Restriction(0.7),
    Restriction(1.3, top_k=20),
    Restriction(0.8, top_p=0.6),
    Restriction(1.0, top_p=0.95),
    Restriction(1.0, min_p=0.1),
    Restriction(1.0, typical_p=0.5),
    Restriction(0.8, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9),
    Restriction(1.0, top_k=1),
    Restriction(1e-6, top_p=0.9),
    Restriction(2.0, top_k=3000, top_p=0.5),
    Restriction(1.0, top_p=0.8, min_p=0.001),
]


@pytest.fixture(autouse=True)
def small_blocks_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_CPU:
        monkeypatch.setattr(choose, "_ROW_BLOCK", 1024)


def logits_of(kind: str, num_rows: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((num_rows, size))
    if kind == "peaked":
        ranks = generator.permuted(np.tile(np.arange(1, size + 1), (num_rows, 1)), axis=1)
        values = values * 0.5 - 1.5 * np.log(ranks)
    logits = torch.from_numpy(values).float()
    if kind == "ties":
        logits = logits.bfloat16().float()
    if kind == "holes":
        logits[:, generator.random(size) < 0.3] = -torch.inf
    return logits.to(DEVICE)


def assert_equal_choices(
    logits: torch.Tensor, restrictions: list[Restriction], masks: list[Flags | None]
) -> None:
    size = logits.shape[1]
    controls = controls_of(restrictions, size, masks=masks, device=DEVICE)
    ids, status, num_kept = choose.choose_and_count(logits, controls)
    expected_ids, expected_status = REFERENCE_SAMPLING.choose_tokens(logits, controls)
    assert torch.equal(status, expected_status)
    exact_logits = logits.double().cpu().numpy()
    for row, restriction in enumerate(restrictions):
        if restriction.temperature == 0:
            assert ids[row] == expected_ids[row]
            continue
        expected = exact_row(exact_logits[row], restriction, masks[row])
        assert (num_kept[row] == 0) == is_open(restriction, size)
        if not expected.is_near and num_kept[row] > 0:
            difference = abs(int(num_kept[row]) - int(expected.kept.sum()))
            assert difference <= expected.near.sum(), (row, restriction)
        if ids[row] != expected_ids[row]:
            noise = gumbel_noise(controls.seeds[[row]], controls.positions[[row]], size)[0]
            both = [int(ids[row]), int(expected_ids[row])]
            with np.errstate(divide="ignore"):
                log_shares = np.log(expected.probabilities[both])
            one, other = log_shares + noise[both].cpu().numpy()
            assert abs(one - other) < NEAR_RACE or expected.is_near or expected.near[both].any()


def is_open(restriction: Restriction, size: int) -> bool:
    """Whether the temperature is all that the row asks for."""
    has_top_k = 0 < restriction.top_k < size
    shares = restriction.top_p, restriction.typical_p, 1 - restriction.min_p
    return not has_top_k and shares == (1, 1, 1)


def masks_of(num_rows: int, size: int) -> list[Flags | None]:
    """Every third row may choose half of its tokens."""
    generator = np.random.default_rng(5)
    flags = generator.random((num_rows, size)) < 0.5
    flags[:, -1] = True
    return [flags[row] if row % 3 == 2 else None for row in range(num_rows)]


@pytest.mark.parametrize(
    ("kind", "size"), [("gaussian", 1), ("gaussian", 2), ("holes", 50), ("ties", 1023)]
)
def test_small_vocabularies(kind: str, size: int) -> None:
    num_rows = len(RESTRICTIONS)
    logits = logits_of(kind, num_rows, size)
    logits[:, -1] = 1.0
    assert_equal_choices(logits, RESTRICTIONS, masks_of(num_rows, size))


@pytest.mark.parametrize(
    "kind",
    [pytest.param("gaussian", marks=pytest.mark.slow), "peaked", "ties"],
)
def test_candidates_of_several_chunks(kind: str) -> None:
    chosen = [RESTRICTIONS[index] for index in (1, 2, 3, 5, 6, 7, 11)]
    logits = logits_of(kind, len(chosen), 9001)
    assert_equal_choices(logits, chosen, masks_of(len(chosen), 9001))


def test_more_equal_logits_than_candidates_fit() -> None:
    logits = torch.zeros(2, choose._CAPACITY + 800, device=DEVICE)
    logits[:, 17] = 1.0
    assert_equal_choices(logits, [Restriction(top_k=20), Restriction(top_p=0.01)], [None, None])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [50, 1000, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("kind", ["gaussian", "peaked", "ties", "holes"])
def test_all_vocabularies(kind: str, size: int) -> None:
    given = 2 * RESTRICTIONS
    logits = logits_of(kind, len(given), size)
    logits[:, -1] = 0.5
    assert_equal_choices(logits, given, masks_of(len(given), size))


def test_noise_is_exact_to_float32() -> None:
    """The winners of a race come of the least words, whose noise must not lose its digits."""
    words = torch.tensor([0, 1, 2, 77, 2**20 + 1, 2**27, 2**28 - 1, 2**28, 2**31, 2**32 - 1])
    uniforms = (words.double() + 0.5) / 2**32
    expected = -torch.log(-torch.log1p(-uniforms))
    torch.testing.assert_close(
        noise_of_words(words.to(DEVICE)).double().cpu(), expected, rtol=1e-6, atol=1e-6
    )


def test_one_rows_numbers_do_not_reach_another() -> None:
    size = 4500
    logits = logits_of("gaussian", 8, size)
    logits[0, 4400] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[5, 39] = torch.nan
    logits[6, 4499] = -torch.nan
    none = np.zeros(size, bool)
    masks = [None, None, None, np.arange(size) == 4499, none, np.arange(size) < 3, None, None]
    broken, empty = NON_FINITE, NOTHING_ALLOWED
    statuses = [broken, broken, empty, OK, empty, broken, broken, OK]
    for restriction in (Restriction(0.0), Restriction(1.0), Restriction(1.0, top_k=9, top_p=0.9)):
        controls = controls_of([restriction] * 8, size, masks=masks, device=DEVICE)
        ids, status = TRITON.choose_tokens(logits, controls)
        expected, _ = REFERENCE_SAMPLING.choose_tokens(logits, controls)
        assert status.tolist() == statuses
        assert ids.tolist() == expected.tolist()


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    """Whichever way it takes: of one pass, of candidates, of the whole row."""
    given = [RESTRICTIONS[index] for index in (1, 0, 4, 3, 2)]
    logits = logits_of("peaked", len(given), 4200)
    logits[2] *= 0.1
    together, _ = TRITON.choose_tokens(logits, controls_of(given, 4200, device=DEVICE))
    for row in (0, 2, 4):
        alone = controls_of([given[row]], 4200, seeds=[row], positions=[row], device=DEVICE)
        ids, _ = TRITON.choose_tokens(logits[row : row + 1], alone)
        assert ids.tolist() == [together[row]]


def test_equal_rows_at_one_place() -> None:
    """Rows that are the same memory, and rows that are wider apart than they are long."""
    wide = logits_of("gaussian", 2, 600)
    same = wide[:1, :500].expand(4, 500)
    given = [Restriction(0.0), Restriction(1.0), Restriction(top_k=3), Restriction(0.0)]
    assert_equal_choices(same, given, [None] * 4)
    assert_equal_choices(wide[:, :500], given[:2], [None] * 2)


def counts_on(device: torch.device, size: int) -> TokenCounts:
    return TokenCounts(max_slots=5, vocab_size=size, max_distinct=size, device=device)


@pytest.mark.parametrize("size", [37, 3000])
def test_penalties(size: int) -> None:
    generator = np.random.default_rng(3)
    ours, theirs = counts_on(DEVICE, size), counts_on(torch.device("cpu"), size)
    for step in range(4):
        # A prompt, then outputs; the first token comes twice in one call, as both.
        num_tokens = 2500 if step == 0 else 40
        slots = torch.from_numpy(generator.integers(0, 5, num_tokens))
        ids = torch.from_numpy(generator.integers(0, size, num_tokens))
        is_output = torch.from_numpy(generator.random(num_tokens) < 0.3 * step)
        slots[-1], ids[-1], is_output[-1] = slots[0], ids[0], not is_output[0]
        REFERENCE_SAMPLING.count_tokens(theirs, slots, ids, is_output)
        TRITON.count_tokens(ours, slots.to(DEVICE), ids.to(DEVICE), is_output.to(DEVICE))
        if step == 1:
            REFERENCE_SAMPLING.reset_counts(theirs, torch.tensor([3, 1]))
            TRITON.reset_counts(ours, torch.tensor([3, 1], device=DEVICE))
    assert torch.equal(ours.counts.cpu(), theirs.counts)
    assert torch.equal(ours.num_distinct.cpu(), theirs.num_distinct)
    for slot in range(5):
        length = int(theirs.num_distinct[slot])
        listed = (each.distinct_ids[slot, :length].cpu().sort().values for each in (ours, theirs))
        assert torch.equal(*listed)
    logits = logits_of("gaussian", 4, size)
    logits[0, 0] = -torch.inf
    expected = logits.cpu().clone()
    slots = torch.tensor([2, 4, 1, 2])
    amounts = torch.tensor([[1.3, 1.0, 0.8, 1.0], [0.5, 0.0, -1.0, 0.0], [0.1, 0.0, 0.7, 0.3]])
    REFERENCE_SAMPLING.apply_penalties(expected, theirs, slots, *amounts)
    TRITON.apply_penalties(logits, ours, slots.to(DEVICE), *amounts.to(DEVICE))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_counts_of_more_distinct_tokens_than_fit_stay_inside() -> None:
    counts = TokenCounts(max_slots=2, vocab_size=50, max_distinct=4, device=DEVICE)
    ids = torch.arange(10, device=DEVICE)
    zeros = torch.zeros(10, dtype=torch.int64, device=DEVICE)
    TRITON.count_tokens(counts, zeros, ids, zeros > 0)
    assert counts.distinct_ids[1].tolist() == [0] * 4
    assert len(set(counts.distinct_ids[0].tolist())) == 4
    logits = torch.ones(1, 50, device=DEVICE)
    two = torch.tensor([2.0], device=DEVICE)
    TRITON.apply_penalties(logits, counts, zeros[:1], two, two - two, two - two)
    assert int((logits == 0.5).sum()) == 4


def test_values_of_one_pair_are_all_added() -> None:
    logits = torch.zeros(2, 4, device=DEVICE)
    logits[1, 3] = torch.nan
    TRITON.add_to_logits(
        logits,
        torch.tensor([0, 0, 0, 1, 1], device=DEVICE),
        torch.tensor([1, 2, 1, 0, 3], device=DEVICE),
        torch.tensor([5.0, -2.0, -torch.inf, 1.5, -torch.inf], device=DEVICE),
    )
    expected = [[0.0, -torch.inf, -2.0, 0.0], [1.5, 0.0, 0.0, torch.nan]]
    torch.testing.assert_close(logits.cpu(), torch.tensor(expected), equal_nan=True)


def assert_equal_logprobs(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> None:
    got = TRITON.token_logprobs(logits, ids, num_top)
    expected = REFERENCE_SAMPLING.token_logprobs(logits, ids, num_top)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("size", "num_top"), [(1, 1), (2, 2), (50, 20), (50, 0), (5000, 20)])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "holes"])
def test_logprobs(kind: str, size: int, num_top: int) -> None:
    logits = logits_of(kind, 3, size)
    logits[:, 0] = 3.0
    ids = torch.tensor([0, size - 1, size // 2], device=DEVICE)
    assert_equal_logprobs(logits, ids, num_top)


def test_logprobs_of_equal_and_closed_tokens() -> None:
    logits = torch.full((2, 200), -torch.inf, device=DEVICE)
    logits[0] = 0.25
    logits[1, [150, 3]] = 1.0
    assert_equal_logprobs(logits, torch.tensor([7, 3], device=DEVICE), 20)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [50, 1000, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("kind", ["gaussian", "peaked", "ties", "holes"])
def test_logprobs_of_all_vocabularies(kind: str, size: int) -> None:
    logits = logits_of(kind, 16, size)
    ids = torch.arange(16, device=DEVICE) * size // 16
    logits[:, 0] = 3.0
    assert_equal_logprobs(logits, ids, 20)


@pytest.fixture
def recorded() -> Iterator[torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    yield graph
    graph.reset()


@pytest.mark.gpu
@needs_gpu
def test_a_graph_holds_a_mixed_batch(recorded: torch.cuda.CUDAGraph) -> None:
    """Recorded once, and replayed with other logits, parameters and history in its buffers."""
    size, given = 32_000, 2 * RESTRICTIONS
    num_rows = len(given)
    counts = TokenCounts(max_slots=num_rows, vocab_size=size, max_distinct=512, device=DEVICE)
    slots = torch.arange(num_rows, device=DEVICE)
    rows = torch.arange(64, device=DEVICE) % num_rows
    generator = np.random.default_rng(0)

    def inputs(turn: int) -> list[torch.Tensor]:
        shift = turn * 5 % num_rows
        controls = controls_of(
            given[shift:] + given[:shift],
            size,
            seeds=range(turn, turn + num_rows),
            masks=masks_of(num_rows, size),
            device=DEVICE,
        )
        amounts = torch.from_numpy(generator.uniform(0.8, 1.2, (3, num_rows))).float()
        pairs = torch.from_numpy(generator.permutation(size)[:64])
        values = torch.from_numpy(generator.standard_normal(64)).float()
        own = [getattr(controls, each.name) for each in fields(controls)]
        logits = logits_of("peaked" if turn % 2 else "gaussian", num_rows, size, seed=turn)
        return [logits, *own, *(each.to(DEVICE) for each in (amounts, pairs, values))]

    def step(buffers: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        logits, *columns, amounts, pairs, values = buffers
        controls = DrawControls(*columns)
        TRITON.apply_penalties(logits, counts, slots, *amounts)
        TRITON.add_to_logits(logits, rows, pairs, values)
        ids, status = TRITON.choose_tokens(logits, controls)
        logprobs = TRITON.token_logprobs(logits, ids, 5)
        TRITON.count_tokens(counts, slots, ids, status == OK)
        return ids, status, *logprobs

    buffers = inputs(0)
    step(buffers)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(recorded):
        results = step(buffers)
    for turn in range(1, 6):
        fresh = inputs(turn)
        before = counts.counts.clone(), counts.distinct_ids.clone(), counts.num_distinct.clone()
        expected = step([each.clone() for each in fresh])
        after = counts.counts.clone()
        for buffer, value in zip(buffers, fresh, strict=True):
            buffer.copy_(value)
        history = counts.counts, counts.distinct_ids, counts.num_distinct
        for state, value in zip(history, before, strict=True):
            state.copy_(value)
        recorded.replay()
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        assert torch.equal(counts.counts, after)
