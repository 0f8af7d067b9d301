"""The judge is judged: what it admits as a near-tie, and what not."""

from collections.abc import Sequence

import pytest
from greedy_reference import NEAR_TIE, TOKENS_PER_NEAR_TIE, GreedyComparison


class TwoBest:
    """A reference that always hesitates between 7 and 8."""

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.asked: list[list[int]] = []

    def two_best(self, token_ids: Sequence[int]) -> tuple[tuple[int, int], float]:
        self.asked.append(list(token_ids))
        return (7, 8), self.gap


def test_equal_outputs_need_no_reference() -> None:
    reference = TwoBest(0.0)
    comparison = GreedyComparison(reference)
    assert comparison.add([1], [2, 3], [2, 3])
    assert reference.asked == []
    assert comparison.num_tokens == 2
    comparison.check()


def test_parting_at_a_near_tie_is_counted() -> None:
    reference = TwoBest(NEAR_TIE)
    comparison = GreedyComparison(reference)
    assert not comparison.add([1], [2, 7, 3], [2, 8])
    assert reference.asked == [[1, 2]]
    assert comparison.num_tokens == 2
    comparison.check()
    comparison.add([1], [7], [8])
    with pytest.raises(AssertionError):
        comparison.check()
    comparison.num_tokens = TOKENS_PER_NEAR_TIE + 1
    comparison.check()


@pytest.mark.parametrize(
    ("gap", "expected", "given"),
    [
        (NEAR_TIE * 1.01, [7], [8]),
        (0.0, [7], [9]),
        (0.0, [7, 2], [7]),
        (0.0, [7], [7, 2]),
    ],
)
def test_anything_else_is_refused(gap: float, expected: list[int], given: list[int]) -> None:
    with pytest.raises(AssertionError):
        GreedyComparison(TwoBest(gap)).add([1], expected, given)
