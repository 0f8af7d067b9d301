"""Where tests run Triton's functions: on a GPU if there is one, otherwise in its interpreter."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_triton() -> None:
    """Call it before kernels are imported: importing them settles how they run."""
    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    triton = pytest.importorskip("triton")
    if DEVICE.type == "cpu" and isinstance(triton.language.philox, triton.runtime.JITFunction):
        raise RuntimeError("triton was imported too early: run pytest with TRITON_INTERPRET=1")
