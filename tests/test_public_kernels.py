"""`mini_infer.kernels`: the kernels under their public names, or what to install for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 100.0


def run_python(code: str, cwd: Path) -> str:
    """In a process of its own, since what is imported settles how kernels run."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rmsnorm_as_the_readme_calls_it(tmp_path: Path) -> None:
    run_python(
        """
import torch
from mini_infer.kernels import triton_rmsnorm
x, weight = torch.randn(3, 64), torch.randn(64)
expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
torch.testing.assert_close(triton_rmsnorm(x, weight, eps=1e-5), expected)
""",
        tmp_path,
    )


def test_every_name_is_imported_when_it_is_named(tmp_path: Path) -> None:
    run_python(
        """
import sys
import mini_infer.kernels as kernels
assert not {"torch", "triton", "mini_infer_kernels"} & set(sys.modules)
for name in kernels.__all__:
    assert getattr(kernels, name).__name__ == name
    assert kernels.__dict__[name] is getattr(kernels, name)
assert sorted(kernels._MODULES) == sorted(kernels.__all__)
try:
    kernels.triton_softmax
except AttributeError as error:
    assert "triton_softmax" in str(error)
else:
    raise AssertionError("there is no such kernel")
""",
        tmp_path,
    )


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_without_its_packages_it_says_what_to_install(missing: str, tmp_path: Path) -> None:
    said = run_python(
        f"""
import sys
sys.modules["{missing}"] = None
try:
    from mini_infer.kernels import triton_rope
except ImportError as error:
    print(error)
""",
        tmp_path,
    )
    assert missing in said
    assert "pip install 'mini-infer[engine,triton]'" in said
