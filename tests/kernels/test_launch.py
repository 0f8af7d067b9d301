"""Launches find the compiled form that fits: types, beginnings, rows and constants in any order."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elementwise_cases import DTYPES, ON_CPU, assert_close, random
from triton_functions import prepare_triton

prepare_triton()

from mini_infer_kernels import launch  # noqa: E402
from mini_infer_kernels.activation import (  # noqa: E402
    triton_gelu_tanh_and_mul,
    triton_silu_and_mul,
)
from mini_infer_kernels.embedding import triton_embedding  # noqa: E402
from mini_infer_kernels.launch import Launcher, has_dependent_launch  # noqa: E402
from mini_infer_kernels.reference.activation import (  # noqa: E402
    reference_gelu_tanh_and_mul,
    reference_silu_and_mul,
)
from mini_infer_kernels.rmsnorm import triton_rmsnorm  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402


@pytest.mark.parametrize("eps", [1, 1e-5])
def test_forms_are_not_mixed_up(eps: float) -> None:
    """Twice each: the second launch takes what the first one compiled, if it may."""
    combinations = list(product(DTYPES, (0, 1, 3), (1, 16, 5), (64, 100)))
    for dtype, offset, rows, columns in combinations + combinations[::-1]:
        x = random(rows * columns + offset, dtype=dtype)[offset:].view(rows, columns)
        weight = random(columns, dtype=dtype, seed=1)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        assert_close(triton_rmsnorm(x, weight, eps), exact * weight.double())


def test_constants_and_absent_arguments_are_told_apart() -> None:
    gate_up, weight = random(2, 32), random(8, 32)
    token_ids = torch.tensor([3, 0], device=weight.device)
    for _ in range(2):
        assert_close(triton_silu_and_mul(gate_up), reference_silu_and_mul(gate_up))
        assert_close(triton_gelu_tanh_and_mul(gate_up), reference_gelu_tanh_and_mul(gate_up))
        for scale in (None, 2, 2.0, 3.0):
            expected = weight[token_ids] * (scale or 1)
            assert torch.equal(triton_embedding(token_ids, weight, scale), expected)


def kernel(x: Any, count: Any, size: Any) -> None:
    """What launches below are of."""


class Kernel(JITFunction):  # type: ignore[misc]
    """A kernel whose launches, Triton's own and direct ones, are written down and end there.

    Attributes:
        form: What Triton's own launch gives.
        launches: Who launched it, and its arguments.
    """

    def __init__(self) -> None:
        super().__init__(kernel)
        self.form: Any = SimpleNamespace(run=self.run_form, function="code", packed_metadata="data")
        self.launches: list[tuple[str, Any]] = []

    def run(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.launches.append(("Triton", (grid, options, arguments)))
        return self.form

    def run_form(self, *arguments: Any) -> None:
        self.launches.append(("direct", arguments))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Triton calls the active driver, of device 5 with stream 7."""
    device = SimpleNamespace(get_current_device=lambda: 5, get_current_stream=lambda index: 7)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=device))
    return device


def launch_all(launcher: Launcher, *tensors: torch.Tensor) -> None:
    for count, x in enumerate(tensors):
        launcher(9, (x,), (count,), (64,), num_warps=2)


def tritons_own(count: int, x: torch.Tensor) -> tuple[str, Any]:
    return "Triton", ((9,), {"num_warps": 2}, (x, count, 64))


@pytest.mark.usefixtures("device")
def test_a_form_is_launched_directly_from_the_second_time_on() -> None:
    written, x = Kernel(), torch.zeros(4)
    launch_all(Launcher(written), x, x)
    direct = (9, 1, 1, 7, "code", "data", None, None, None, x, 1, 64)
    assert written.launches == [tritons_own(0, x), ("direct", direct)]


@pytest.mark.usefixtures("device")
def test_tritons_own_launch_looks_at_other_types_and_beginnings() -> None:
    written, x = Kernel(), torch.zeros(4)
    launch_all(Launcher(written), x, x.half(), x[1:], x[1:], x)
    assert [who for who, _ in written.launches] == [*["Triton"] * 4, "direct"]


@pytest.mark.parametrize(
    "change",
    [
        lambda kernel, device: setattr(kernel, "form", None),
        lambda kernel, device: delattr(kernel.form, "packed_metadata"),
        lambda kernel, device: setattr(kernel.form, "run", lambda grid, stream: None),
        lambda kernel, device: delattr(device, "get_current_stream"),
    ],
    ids=["no form", "no metadata", "other parameters", "no stream"],
)
def test_a_triton_with_other_insides_launches_itself(change: Any, device: SimpleNamespace) -> None:
    written, x = Kernel(), torch.zeros(4)
    change(written, device)
    launch_all(Launcher(written), x, x, x)
    assert written.launches == [tritons_own(count, x) for count in range(3)]


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_dependent_launch_came_with_capability_9(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_dependent_launch.__wrapped__(torch.device("cuda", 0)) is expected
    assert not has_dependent_launch.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="no CUDA device")
def test_this_triton_is_launched_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(3, 64), random(64, seed=1)
    first = triton_rmsnorm(x, weight, 1e-5)
    monkeypatch.delattr(JITFunction, "run")
    assert torch.equal(triton_rmsnorm(x, weight, 1e-5), first)
