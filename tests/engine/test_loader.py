import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
import torch
from mini_infer.config import EngineConfig, bundled_model
from mini_infer.errors import ModelFolderError
from mini_infer_engine import loader
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.loader import load_weights
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.models import MODELS
from mini_infer_engine.weight_files import read_headers
from mini_infer_kernels.kernel_set import REFERENCE
from random_checkpoint import SHAPES as SHAPES_BY_NAME
from random_checkpoint import write_checkpoint
from safetensors.torch import save_file

SHAPES = {"embed": (8, 4), "q": (4, 4), "k": (2, 4), "v": (2, 4), "norm": (4,)}


class TinyModel:
    """Destinations as a real model has them: q, k and v are rows of one fused weight."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, ignorable: frozenset[str] = frozenset()
    ) -> None:
        self.embed = torch.nn.Parameter(torch.full((8, 4), torch.nan, dtype=dtype))
        self.qkv = torch.nn.Parameter(torch.full((8, 4), torch.nan, dtype=dtype))
        self.norm = torch.full((4,), torch.nan, dtype=dtype)
        self._ignorable = ignorable

    def destinations(self) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv[:4], self.qkv[4:6], self.qkv[6:]
        return {"embed": self.embed, "q": q, "k": k, "v": v, "norm": self.norm}

    def ignorable(self) -> frozenset[str]:
        return self._ignorable

    def is_untouched(self) -> bool:
        return all(bool(each.isnan().all()) for each in self.destinations().values())

    def holds(self, expected: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(value, expected[name].to(value.dtype))
            for name, value in self.destinations().items()
        )


def random_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def write_single(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, weights: dict[str, torch.Tensor], **index: object) -> Path:
    """Writes two shards and their index; `index` adds to or replaces entries of its map."""
    weight_map: dict[str, object] = {}
    for number, names in enumerate((["embed", "k"], ["q", "v", "norm"])):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    content = {"metadata": {"total_size": 1}, "weight_map": {**weight_map, **index}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def refusal(folder: Path, model: TinyModel | None = None) -> str:
    """Message of the error that a load ends with; the model must be as it was."""
    model = model or TinyModel()
    with pytest.raises(ModelFolderError) as caught:
        load_weights(model, folder)
    assert model.is_untouched()
    return str(caught.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_fills_every_destination(
    tmp_path: Path, write: Any, stored: torch.dtype, wanted: torch.dtype
) -> None:
    weights = random_weights(stored)
    model = TinyModel(wanted)
    report = load_weights(model, write(tmp_path, weights))
    assert model.holds(weights)
    assert report.num_tensors == 5
    assert report.num_bytes == sum(each.nbytes for each in weights.values())
    assert report.seconds > 0


def test_sharded_equals_single(tmp_path: Path) -> None:
    single, sharded = TinyModel(), TinyModel()
    (tmp_path / "single").mkdir()
    (tmp_path / "sharded").mkdir()
    load_weights(single, write_single(tmp_path / "single", random_weights()))
    load_weights(sharded, write_sharded(tmp_path / "sharded", random_weights()))
    assert torch.equal(single.qkv, sharded.qkv)
    assert torch.equal(single.embed, sharded.embed)
    assert torch.equal(single.norm, sharded.norm)


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, {name: -each for name, each in random_weights().items()})
    write_single(tmp_path, random_weights())
    model = TinyModel()
    load_weights(model, tmp_path)
    assert model.holds(random_weights())


def test_shards_may_be_links_as_in_hub_caches(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_single(tmp_path / "blobs", random_weights())
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/model.safetensors")
    model = TinyModel()
    load_weights(model, tmp_path / "snapshot")
    assert model.holds(random_weights())


def test_inference_tensors_and_parameters_stay_what_they_are(tmp_path: Path) -> None:
    write_single(tmp_path, random_weights())
    with torch.inference_mode():
        inference = TinyModel()
    assert inference.norm.is_inference()
    load_weights(inference, tmp_path)
    assert inference.holds(random_weights())

    model = TinyModel()
    load_weights(model, tmp_path)
    assert not model.qkv.is_inference()
    assert model.qkv.requires_grad
    assert model.qkv.is_leaf


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_reports_progress_in_bytes(tmp_path: Path, write: Any) -> None:
    seen: list[tuple[int, int]] = []
    report = load_weights(
        TinyModel(), write(tmp_path, random_weights()), lambda *each: seen.append(each)
    )
    assert {total for _, total in seen} == {report.num_bytes}
    done = [done for done, _ in seen]
    assert len(done) == 5
    assert done == sorted(set(done))
    assert done[-1] == report.num_bytes


def test_ignorable_tensors_are_skipped(tmp_path: Path) -> None:
    weights = {
        **random_weights(),
        "lm_head.weight": torch.zeros(8, 4),
        "layers.0.rotary_emb.inv_freq": torch.zeros(2),
        "layers.0.mask": torch.zeros(4, dtype=torch.bool),
    }
    write_single(tmp_path, weights)
    model = TinyModel(
        ignorable=frozenset({"lm_head.weight", "*.rotary_emb.inv_freq", "layers.*.mask"})
    )
    report = load_weights(model, tmp_path)
    assert report.num_tensors == 5
    assert report.num_bytes == sum(each.nbytes for each in random_weights().values())
    assert "unexpected 'lm_head.weight'" in refusal(tmp_path)


def test_one_error_lists_every_mismatch(tmp_path: Path) -> None:
    weights = random_weights()
    del weights["embed"], weights["norm"]
    weights["q"] = torch.zeros(4, 5)
    weights["k"] = torch.zeros(2, 4, dtype=torch.int32)
    weights |= {"bias": torch.zeros(3), "extra": torch.zeros(1)}
    message = refusal(write_single(tmp_path, weights))
    for part in (
        "missing 'embed'",
        "missing 'norm'",
        "expected shape [4, 4] for 'q', got [4, 5]",
        "expected 'k' in one of F32, F16, BF16, got I32",
        "unexpected 'bias'",
        "unexpected 'extra'",
    ):
        assert part in message


def test_a_long_list_of_mismatches_is_cut(tmp_path: Path) -> None:
    weights = {f"extra{number}": torch.zeros(1) for number in range(1000)}
    message = refusal(write_single(tmp_path, weights))
    assert message.count("unexpected") == loader.MAX_LISTED_PROBLEMS
    assert f"and {1000 + len(SHAPES) - loader.MAX_LISTED_PROBLEMS} more" in message


def test_quantized_weights_are_refused_with_what_to_use(tmp_path: Path) -> None:
    weights = {**random_weights(), "q": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    message = refusal(write_single(tmp_path, weights))
    assert "expected 'q' in one of F32, F16, BF16, got F8_E4M3" in message
    assert "use the one in 16 bits" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, random_weights())
    second = {name: random_weights()[name] for name in ("q", "v", "norm", "k")}
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    assert "'k' stands in model-00001-of-00002.safetensors and in" in refusal(tmp_path)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "has no weights" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps("never loaded"))
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    message = refusal(tmp_path)
    assert "only pickled weights (consolidated.00.pth, pytorch_model.bin)" in message
    assert "convert them to safetensors" in message


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_single(tmp_path, random_weights()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors is truncated or damaged" in refusal(tmp_path)


def test_loads_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    expected = {name: each.detach() for name, each in reference.state_dict().items()}
    for shard_size, num_files in (("1GB", 1), ("10KB", 2)):
        folder = tmp_path / shard_size
        reference.save_pretrained(folder, max_shard_size=shard_size)
        assert len(list(folder.glob("*.safetensors"))) >= num_files
        filled = {name: torch.empty_like(each) for name, each in expected.items()}
        report = load_weights(_Destinations(filled), folder)
        assert report.num_tensors == len(expected)
        assert all(torch.equal(filled[name], expected[name]) for name in expected)


class _Destinations:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def destinations(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def ignorable(self) -> frozenset[str]:
        return frozenset()


@pytest.mark.parametrize("shape", SHAPES_BY_NAME)
def test_benchmark_checkpoints_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Names and shapes of the real models, two layers of them, shrunk."""
    config = {
        **SHAPES_BY_NAME[shape],
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    monkeypatch.setattr(random_checkpoint, "MAX_SHARD_BYTES", 8000)
    written = write_checkpoint(tmp_path / "a", config, seed=3)
    again = write_checkpoint(tmp_path / "b", config, seed=3)
    assert len(list(tmp_path.glob("a/model-*.safetensors"))) > 1
    assert read_headers(tmp_path / "a")[0].path.stat().st_size < 8000 + 4000
    model_config = read_model_config(tmp_path / "a")
    backend = Backend(REFERENCE, torch.float32, torch.device("cpu"))
    models = [
        MODELS[model_config.architecture](model_config, backend, num_positions=8) for _ in "ab"
    ]
    reports = [
        load_weights(model, tmp_path / name) for model, name in zip(models, "ab", strict=True)
    ]
    assert {report.num_bytes for report in reports} == {written} == {again}
    one, other = (model.destinations() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(bool(each.isfinite().all()) for each in one.values())


def test_weights_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    from mini_infer_engine.build import build_engine

    folder = tmp_path / "model"
    shutil.copytree(bundled_model("demo"), folder)
    config = json.loads((folder / "config.json").read_text())
    # Two terabytes of weights, by this config.
    config |= {"hidden_size": 2**14, "intermediate_size": 2**18, "num_hidden_layers": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="do not fit its config"):
        build_engine(EngineConfig(model=str(folder)))
