"""The gather of embeddings in Triton: bits equal to those of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from elementwise_cases import DTYPES, ON_CPU, nan_filled_memory, random
from triton_functions import DEVICE, prepare_triton

prepare_triton()

from mini_infer_kernels.embedding import triton_embedding  # noqa: E402
from mini_infer_kernels.reference.embedding import reference_embedding  # noqa: E402


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with nan_filled_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 51.3])
@pytest.mark.parametrize("hidden_size", [1, 72, 1024, 2500])
def test_equals_the_reference(
    dtype: torch.dtype, id_type: torch.dtype, scale: float | None, hidden_size: int
) -> None:
    weight = random(11, hidden_size, dtype=dtype)
    token_ids = torch.tensor([10, 0, 3, 3, 7], dtype=id_type, device=DEVICE)
    got = triton_embedding(token_ids, weight, scale)
    assert torch.equal(got, reference_embedding(token_ids, weight, scale))


def test_the_scale_is_rounded_to_the_models_type() -> None:
    weight = torch.full((1, 8), 3.0, dtype=torch.float16, device=DEVICE)
    token_ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    scale = 1.0 + 0.49 * torch.finfo(torch.float16).eps
    assert (triton_embedding(token_ids, weight, scale) == 3.0).all()


def test_no_tokens_and_wrong_layouts() -> None:
    weight = random(4, 8)
    assert triton_embedding(torch.tensor([], dtype=torch.int64), weight).shape == (0, 8)
    with pytest.raises(ValueError, match="contiguous"):
        triton_embedding(torch.zeros(2, dtype=torch.int64), weight.t())


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="no CUDA device")
def test_a_weight_that_32_bits_do_not_count() -> None:
    weight = torch.empty(300_000, 8192, dtype=torch.bfloat16, device=DEVICE).normal_()
    token_ids = 299_999 - torch.arange(64, device=DEVICE)
    assert torch.equal(triton_embedding(token_ids, weight), weight[token_ids])
