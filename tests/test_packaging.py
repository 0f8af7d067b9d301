"""The wheel holds everything that an installation needs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mini_infer": ROOT / "services/common/mini_infer",
    "mini_infer_gateway": ROOT / "services/gateway/mini_infer_gateway",
    "mini_infer_tokenizer": ROOT / "services/tokenizer/mini_infer_tokenizer",
    "mini_infer_engine": ROOT / "services/engine/mini_infer_engine",
    "mini_infer_kernels": ROOT / "kernels/mini_infer_kernels",
}
MODELS = ("demo", "demo-draft")
TIMEOUT_S = 100.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the build backend itself: no isolation, no network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True, timeout=TIMEOUT_S
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_in_the_wheel(names: set[str], package: str) -> None:
    folder = PACKAGES[package]
    modules = {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
    assert modules
    assert modules <= names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(names: set[str], package: str) -> None:
    assert f"{package}/py.typed" in names


@pytest.mark.parametrize("model", MODELS)
def test_the_bundled_models_are_in_the_wheel(names: set[str], model: str) -> None:
    for file in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        assert f"mini_infer/bundled_models/{model}/{file}" in names


def test_nothing_else_is_in_the_wheel(names: set[str]) -> None:
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    assert f"{info}/licenses/LICENSE" in names
    assert not any("__pycache__" in name for name in names)


def test_an_installation_finds_its_packages_and_model(wheel: Path, tmp_path: Path) -> None:
    """The wheel alone, unpacked, in place of the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import mini_infer, mini_infer_gateway.server, mini_infer_tokenizer.server, mini_infer_engine.server
from mini_infer.config import EngineConfig
folder = EngineConfig().model_folder
for module in [m for name, m in sys.modules.items() if name.startswith("mini_infer")]:
    assert module.__file__.startswith({str(tmp_path)!r}), module
assert folder.is_relative_to({str(tmp_path)!r}), folder
assert (folder / "model.safetensors").is_file()
"""
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=TIMEOUT_S,
    )


def test_the_command_is_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith("entry_points.txt")]
        text = archive.read(name).decode()
    assert "mini-infer = mini_infer.cli.main:main" in text
