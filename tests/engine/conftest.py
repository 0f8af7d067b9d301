"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
from mini_infer.config import EngineConfig
from mini_infer_engine.build import Engine, build_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The demo model with its defaults, built once per module."""
    return build_engine(EngineConfig(kv_cache_tokens=32768))
