"""The engine's sampler: from sequences' parameters to tokens and log-probabilities.

The distributions themselves are tested with the kernels (`tests/kernels`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.sampling_columns import columns_of, resolved
from mini_infer.logprobs import LogprobColumns
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import RowStatus, SamplingColumns, StepTokens
from mini_infer_engine.block_manager import BlockTransfers
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sampling import Sampler
from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.sequence import StreamKey
from mini_infer_kernels import sampling_kernels
from mini_infer_kernels.sampling_kernels import REFERENCE_SAMPLING

VOCAB = 50


def new_sampler(max_num_seqs: int = 64) -> Sampler:
    return Sampler(
        REFERENCE_SAMPLING,
        vocab_size=VOCAB,
        max_num_seqs=max_num_seqs,
        max_model_len=128,
        device=torch.device("cpu"),
    )


def sample(logits: torch.Tensor, columns: SamplingColumns) -> StepTokens:
    masks = np.empty((0, 2), np.int32)
    return new_sampler().launch(logits.clone(), columns, lambda: masks)()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = normal(8, VOCAB, seed=5)
    rows = [
        resolved(seed=9),
        resolved(seed=9, top_k=7),
        resolved(seed=2, repetition_penalty=1.7),
        resolved(seed=3, temperature=0.0),
        resolved(seed=4, bias_ids=[3], bias_values=[5.0]),
        resolved(seed=5, num_logprobs=2),
        resolved(seed=6, typical_p=0.4),
        resolved(seed=7, min_p=0.2, presence_penalty=1.5),
    ]
    outputs = [[4] * index for index in range(8)]
    together = sample(logits, columns_of(rows, outputs=outputs))
    for row in range(8):
        alone = sample(logits[row : row + 1], columns_of([rows[row]], outputs=[outputs[row]]))
        assert alone.token_ids[0, 0] == together.token_ids[row, 0]


def test_seeds_and_positions_draw_different_tokens() -> None:
    logits = torch.zeros(40, VOCAB)
    by_seed = sample(logits, columns_of([resolved(seed=seed) for seed in range(40)]))
    outputs = [[7] * position for position in range(40)]
    by_position = sample(logits, columns_of([resolved(seed=3)] * 40, outputs=outputs))
    for tokens in (by_seed, by_position):
        assert len(set(tokens.token_ids[:, 0].tolist())) > 15


def test_greedy_and_drawing_rows_mix() -> None:
    logits = normal(4, VOCAB, seed=1)
    greedy, drawing = resolved(temperature=0.0), resolved(seed=8)
    mixed = sample(logits, columns_of([greedy, drawing, greedy, drawing])).token_ids[:, 0]
    assert mixed[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    drawn = sample(logits, columns_of([drawing] * 4)).token_ids[:, 0]
    assert mixed[[1, 3]].tolist() == drawn[[1, 3]].tolist()


def test_banned_ids_are_not_chosen_and_biased_ones_are() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 7], logits[:, 9] = 50.0, 40.0
    for temperature in (0.0, 1.0):
        free = resolved(temperature=temperature)
        banned = resolved(temperature=temperature, bad_words=[[7]])
        biased = resolved(temperature=temperature, bias_ids=[11], bias_values=[99.0])
        tokens = sample(logits, columns_of([free, banned, biased]))
        assert tokens.token_ids[:, 0].tolist() == [7, 9, 11]


def test_ends_are_banned_until_min_tokens() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 7], logits[:, 9], logits[:, 3] = 50.0, 40.0, 30.0
    early = resolved(temperature=0.0, min_tokens=2, stop_token_ids=[9])
    outputs = [[1], [1, 2]]
    tokens = sample(logits, columns_of([early, early], outputs=outputs, end_ids=[7]))
    assert tokens.token_ids[:, 0].tolist() == [3, 7]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = normal(3, VOCAB, seed=2) * 1e4
    tokens = sample(logits, columns_of([resolved(temperature=1e-30)] * 3))
    assert tokens.token_ids[:, 0].tolist() == logits.argmax(-1).tolist()
    assert tokens.statuses.tolist() == [RowStatus.OK] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_rows_without_a_token_are_told_apart(temperature: float, penalty: float) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[1, 4] = float("nan")
    logits[2, 4] = float("inf")
    logits[3] = float("-inf")
    logits[4, 4] = float("-inf")  # a token that cannot be, which is no fault
    rows = [resolved(temperature=temperature, repetition_penalty=penalty)] * 5
    tokens = sample(logits, columns_of(rows))
    assert tokens.statuses.tolist() == [
        RowStatus.OK,
        RowStatus.NON_FINITE,
        RowStatus.NON_FINITE,
        RowStatus.NOTHING_ALLOWED,
        RowStatus.OK,
    ]


def test_penalties_count_the_prompt_and_each_step_of_the_output() -> None:
    """A sequence that keeps its slot is counted on from step to step."""
    sampling = resolved(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    logits = torch.full((1, VOCAB), 1.0)
    logits[0, 4], logits[0, 5], logits[0, 6] = 8.0, 7.9, 2.99
    sampler = new_sampler()
    chosen: list[int] = []
    sequence = EngineSequence(
        StreamKey(b"", 0), [9, 5], sampling, eos_token_ids=(), output_ids=chosen
    )
    sequence.block_table = [0]
    running = RunningBatch(1)
    running.add(sequence)
    for _ in range(6):
        batch = running.build(0, [], [(sequence, sequence.num_tokens)], BlockTransfers())
        tokens = sampler.launch(
            logits.clone(), batch.sampling, lambda: np.empty((0, 2), np.int32)
        )()
        chosen.append(int(tokens.token_ids[0, 0]))
        sequence.token_ids.append(chosen[-1])
    # By hand: 5 is in the prompt, so halved; 4 is halved and falls by 0.75 once chosen, then by
    # 0.25 each time.
    assert chosen == [4, 5, 4, 5, 4, 6]


def test_logprobs_are_those_of_the_model_before_everything_else() -> None:
    logits = normal(3, VOCAB, seed=11)
    plain = resolved(temperature=0.0)
    wants = resolved(temperature=0.5, top_k=1, bias_ids=[20], bias_values=[99.0], num_logprobs=4)
    only = resolved(temperature=0.0, repetition_penalty=3.0, num_logprobs=0)
    tokens = sample(logits, columns_of([plain, wants, only]))
    assert sorted(tokens.logprobs) == [1, 2]
    assert tokens.token_ids[1, 0] == 20
    expected = logits.double().log_softmax(-1)
    for row, num_top in ((1, 4), (2, 0)):
        columns = tokens.logprobs[row]
        assert isinstance(columns, LogprobColumns)
        assert columns.is_consistent
        (told,) = columns.tokens()
        chosen = int(tokens.token_ids[row, 0])
        assert told.logprob == pytest.approx(float(expected[row, chosen]), abs=1e-5)
        assert told.rank == 1 + int((logits[row] > logits[row, chosen]).sum())
        best = expected[row].topk(num_top)
        assert [each.token_id for each in told.top] == best.indices.tolist()
        assert [each.logprob for each in told.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_statuses_are_those_of_the_kernels() -> None:
    assert [RowStatus.OK, RowStatus.NON_FINITE, RowStatus.NOTHING_ALLOWED] == [
        sampling_kernels.OK,
        sampling_kernels.NON_FINITE,
        sampling_kernels.NOTHING_ALLOWED,
    ]


def test_shares_never_reach_the_device_as_nothing() -> None:
    columns = columns_of([resolved(top_p=5e-324, typical_p=1e-46)])
    assert columns.top_ps[0] > 0
    assert columns.typical_ps[0] > 0


def test_masks_are_asked_for_once_and_only_where_a_row_is_masked() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 5.0
    masks = np.zeros((1, 2), np.int32)
    masks[0, 1] = 1 << 3  # only id 35
    calls = []

    def fill() -> np.ndarray:
        calls.append(1)
        return masks

    greedy: ResolvedSampling = resolved(temperature=0.0)
    columns = columns_of([greedy, greedy])
    sampler = new_sampler()
    assert sampler.launch(logits.clone(), columns, fill)().token_ids[:, 0].tolist() == [7, 7]
    assert not calls
    masked = replace(columns, masked=np.array([1]))
    assert sampler.launch(logits.clone(), masked, fill)().token_ids[:, 0].tolist() == [7, 35]
    assert len(calls) == 1
