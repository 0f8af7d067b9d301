"""Steps of any size run with the kernels that were compiled before the engine served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "count_compilations.py"
NUM_PRODUCTS = 4
"""Of a step: of the attention's input, of both sides of the feed forward, of the logits."""


def test_few_forms_serve_all_steps() -> None:
    """In a process of its own: this one's kernels may be the interpreter's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "step_inputs._update_tables_kernel": 1,
        "step_inputs._step_inputs_kernel": 1,
        "embedding._embedding_kernel": 1,
        "gemv._gemv_kernel": 3 * NUM_PRODUCTS,  # for one row, for two, for three and four
        "rmsnorm._rmsnorm_kernel": 2,  # for few rows and for many
        "qk_norm_rope_store._qk_norm_rope_store_kernel": 2,  # likewise
        "decode_plan._schedule_kernel": 1,
        "decode_attention._decode_kernel": 1,
        "prefill_attention._prefill_kernel": 1,
        "hopper_prefill.launch._prefill_kernel": 1,
        "activation._gate_kernel": 1,
    }
