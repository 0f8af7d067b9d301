from __future__ import annotations

from gateway.harness import thoughts
from hypothesis import given
from hypothesis import strategies as st
from mini_infer_gateway.logprob_queue import LogprobQueue


@given(
    rows=st.lists(st.integers(0, 6), max_size=12),
    cuts=st.lists(st.integers(0, 9), max_size=30),
    num_top=st.integers(0, 3),
)
def test_tokens_leave_in_their_order_however_rows_and_releases_are_cut(
    rows: list[int], cuts: list[int], num_top: int
) -> None:
    """Rows come in between the releases, each release of what is there at most."""
    queue = LogprobQueue()
    everything = thoughts(0, range(sum(rows)), num_top)
    num_put = num_taken = 0
    for cut in [*cuts, *rows, sum(rows)]:
        if rows:
            count = rows.pop(0)
            row = everything.part(num_put, num_put + count)
            queue.put(row if count else thoughts(0, [], num_top + 1))
            num_put += count
        num_wanted = min(cut, num_put - num_taken)
        taken = queue.take(num_wanted)
        if num_wanted == 0:
            assert taken is None
        else:
            assert taken == everything.part(num_taken, num_taken + num_wanted)
        num_taken += num_wanted
    assert num_taken == everything.num_tokens
