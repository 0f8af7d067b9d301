"""Who may load what, checked in fresh processes; import-linter checks the source (`make lint`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 100.0


def module_names(folder: str) -> list[str]:
    """Every module of the packages in a component folder."""
    paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return sorted(name for name in names if not name.endswith("__main__"))


def run_python(code: str, *, cwd: Path = ROOT, python_path: Path | None = None) -> None:
    environment = dict(os.environ)
    if python_path:
        environment["PYTHONPATH"] = str(python_path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", module_names("services/gateway"))
def test_the_gateway_does_not_load_torch(name: str, tmp_path: Path) -> None:
    run_python(f"import sys, {name}; assert 'torch' not in sys.modules", cwd=tmp_path)


@pytest.mark.parametrize("name", module_names("services/tokenizer"))
def test_the_tokenizer_does_not_load_torch(name: str, tmp_path: Path) -> None:
    forbidden = "{'torch', 'grpc'}"
    run_python(f"import sys, {name}; assert not {forbidden} & set(sys.modules)", cwd=tmp_path)


def test_the_scripted_engine_does_not_load_torch(tmp_path: Path) -> None:
    code = "import sys, mini_infer_engine.scripted; assert 'torch' not in sys.modules"
    run_python(code, cwd=tmp_path)


def test_the_package_itself_loads_neither_torch_nor_grpc(tmp_path: Path) -> None:
    code = "import sys, mini_infer; assert not {'torch', 'grpc', 'zmq'} & set(sys.modules)"
    run_python(code, cwd=tmp_path)


def test_the_gateway_and_tokenizer_work_without_torch_installed(tmp_path: Path) -> None:
    """As in their container images."""
    code = """
import sys
sys.modules["torch"] = None
import mini_infer_gateway.server, mini_infer_tokenizer.server
import mini_infer
try:
    mini_infer.LLMEngine
except ModuleNotFoundError as error:
    assert error.name == "torch", error
else:
    raise AssertionError("LLMEngine was imported without torch")
"""
    run_python(code, cwd=tmp_path)


USE_TRANSFORMERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=32,
)
model = LlamaForCausalLM(config)
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
"""


def test_transformers_imports_beside_our_kernels_folder() -> None:
    """`transformers` probes for a top-level `kernels`: ours must not look like it."""
    run_python(
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is None, spec\n" + USE_TRANSFORMERS
    )


FAKE_KERNELS = """
__version__ = "VERSION"

class Anything:
    def __init__(self, *args, **options):
        pass

    def __call__(self, decorated):
        return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {})
"""
"""Has every name; used as a decorator with arguments, each gives back what it decorates."""


@pytest.fixture
def hub_kernels(tmp_path: Path) -> Path:
    """A folder where a distribution like Hugging Face's `kernels` is installed."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    site = tmp_path / "site"
    package = site / "kernels"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(FAKE_KERNELS.replace("VERSION", version))
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    info.joinpath("METADATA").write_text(metadata)
    info.joinpath("RECORD").write_text("kernels/__init__.py,,\n")
    return site


def test_an_installed_kernels_distribution_wins_over_our_folder(hub_kernels: Path) -> None:
    run_python(
        "import kernels\n"
        f"assert kernels.__file__ == {str(hub_kernels / 'kernels' / '__init__.py')!r}\n"
        "from transformers.utils import is_kernels_available\n"
        "assert is_kernels_available()\n" + USE_TRANSFORMERS,
        python_path=hub_kernels,
    )


@pytest.mark.parametrize("folder", ["kernels", "services"])
def test_component_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


FORBIDDEN = re.compile(
    r"""
    \b(import|from)\s+(c?pickle|_pickle|marshal|shelve|dill|cloudpickle|joblib)\b
    | \btorch\.load\b
    | \b(recv|send)_pyobj\b
    | (?<![\w.])(eval|exec)\(
    """,
    re.VERBOSE,
)


def test_nothing_in_the_tree_can_run_what_it_reads() -> None:
    """Data that becomes code is how serving systems were broken into; tools are no exception."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("services", "kernels", "models", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if FORBIDDEN.search(line)
    ]
    assert found == []
