"""What `benchmarks/profile_step.py` makes of recorded kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_step import (
    GROUPS,
    Group,
    Kernel,
    Profile,
    covered_us,
    group_of,
    grouped,
    table,
)

KERNELS = Path(__file__).parents[1] / "kernels" / "mini_infer_kernels"
TORCHS_OWN = {
    "nvjet_tst_128x64_64x8_2x1_v_bz_TNT": "products",
    "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x8_cublas": "products",
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_64x64_16x6_tn_align4>(...)": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, ...>": "products",
    "void gemvx::kernel<int, int, float, float, float, float, false, true>": "products",
    "void at::native::reduce_kernel<512, 1, ReduceOp<float, MaxOps<float>>>": "sampling",
    "void at::native::vectorized_elementwise_kernel<4, masked_fill_kernel(...)>": "sampling",
    "void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long>": (
        "embedding and inputs"
    ),
    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*)": (
        "embedding and inputs"
    ),
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memcpy DtoH (Device -> Pinned)": "copies",
    "Memset (Device)": "copies",
    "some_kernel_of_the_future": "others",
}
OURS = {
    "_decode_kernel": "attention",
    "_prefill_kernel": "attention",
    "_schedule_kernel": "attention",
    "_qk_norm_rope_store_kernel": "norm, turn and store",
    "_rope_kernel": "norm, turn and store",
    "_store_kv_kernel": "norm, turn and store",
    "_rmsnorm_kernel": "norms",
    "_add_rmsnorm_kernel": "norms",
    "_gate_kernel": "gates",
    "_embedding_kernel": "embedding and inputs",
    "_step_inputs_kernel": "embedding and inputs",
    "_update_tables_kernel": "embedding and inputs",
    "_gemv_kernel": "products",
    "scan_kernel": "sampling",
    "select_kernel": "sampling",
    "whole_row_kernel": "sampling",
    "_scan_kernel": "sampling",
    "_rank_kernel": "sampling",
    "_add_to_logits_kernel": "sampling",
    "_reset_counts_kernel": "sampling",
    "_count_tokens_kernel": "sampling",
    "_apply_penalties_kernel": "sampling",
}
Interval = tuple[int, int]


def launched_kernels() -> Iterator[str]:
    """Names of the kernels of the project: functions for a GPU whose names say so."""
    for file in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any("jit" in ast.unparse(each) for each in node.decorator_list):
                    yield node.name


def test_every_kernel_of_the_project_is_known() -> None:
    assert set(launched_kernels()) == set(OURS)


@pytest.mark.parametrize(("name", "group"), {**OURS, **TORCHS_OWN}.items())
def test_a_kernel_belongs_to_what_it_does(name: str, group: str) -> None:
    assert group_of(name) == group
    assert group in (*GROUPS, "others")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))))
def test_overlapping_kernels_count_once(starts_and_lengths: list[Interval]) -> None:
    intervals = [(start, start + length) for start, length in starts_and_lengths]
    moments = {moment for start, end in intervals for moment in range(start, end)}
    assert covered_us(intervals) == len(moments)


def test_a_table_of_overlapping_kernels() -> None:
    """Two steps of 100 us; a product begins 10 us before the attention in front of it ends."""
    kernels = [
        Kernel(name, 100 * step + start, 100 * step + end)
        for step in range(2)
        for name, start, end in (
            ("_decode_kernel", 0, 50),
            ("_gemv_kernel", 40, 80),
            ("_gemv_kernel", 80, 90),
        )
    ]
    groups = grouped(kernels, 2)
    assert groups == {"attention": Group(1, 50), "products": Group(2, 50)}
    busy_us = covered_us([(kernel.start_us, kernel.end_us) for kernel in kernels]) / 2
    rows = table(Profile(groups, busy_us, 100.0, 1), {"attention": 40.0, "gates": 1.0})
    by_name = {row["what"]: row for row in rows}
    assert [row["what"] for row in rows[-2:]] == ["gaps", "step"]
    assert by_name["attention"]["share_of_limit"] == 0.8
    assert by_name["products"] == {
        "what": "products",
        "launches": 2,
        "us": 50,
        "share_of_step": 0.5,
        "limit_us": None,
        "share_of_limit": None,
    }
    assert by_name["gaps"] == {"what": "gaps", "us": 10, "share_of_step": 0.1}
    assert by_name["step"] == {"what": "step", "us": 100, "limit_us": 41}
