"""Whether a checkpoint's output projection is its embedding, whatever its config.json says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import structlog
from mini_infer.model_folder import opened

from mini_infer_engine.model_config import ModelConfig
from mini_infer_engine.weight_files import StoredTensor, WeightFile, read_headers

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_CHUNK_BYTES = 2**22

_log = structlog.get_logger("engine")


def with_stored_ties(config: ModelConfig, folder: Path) -> ModelConfig:
    """A config that ties the two only where the weights do.

    Where a checkpoint holds both and they differ, they are not tied: `transformers` decides so as
    well.

    Args:
        config: What config.json says.
        folder: The model folder.

    Raises:
        ModelFolderError: A weight file is missing or damaged.
    """
    if not config.tie_word_embeddings:
        return config
    stored = {
        name: (file, tensor)
        for file in read_headers(folder)
        for name, tensor in file.tensors.items()
        if name in (EMBEDDING, OUTPUT)
    }
    if len(stored) < 2 or _are_equal(*stored[EMBEDDING], *stored[OUTPUT]):
        return config
    _log.warning("the weights are not tied, though config.json says so", tensor=OUTPUT)
    return replace(config, tie_word_embeddings=False)


def _are_equal(
    file: WeightFile, tensor: StoredTensor, other_file: WeightFile, other: StoredTensor
) -> bool:
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    chunks = zip(_chunks(file, tensor), _chunks(other_file, other), strict=True)
    return all(one == another for one, another in chunks)


def _chunks(file: WeightFile, tensor: StoredTensor) -> Iterator[bytes]:
    start, end = (file.data_start + offset for offset in tensor.data_offsets)
    with opened(file.path) as (source, _):
        source.seek(start)
        for offset in range(start, end, _CHUNK_BYTES):
            yield source.read(min(_CHUNK_BYTES, end - offset))
