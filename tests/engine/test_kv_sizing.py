"""How many blocks there are, and what is said where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError
from mini_infer_engine.build import build_engine
from mini_infer_engine.kv_cache import KVCacheSpec
from mini_infer_engine.memory import GIB, CacheSize, FreeMemory, size_cache

MAX_MODEL_LEN = 1000
SMALL = {"cache_gib": 0.25}


def spec_on(device: str) -> KVCacheSpec:
    """Of blocks of 1 MiB."""
    return KVCacheSpec(
        num_layers=4,
        num_kv_heads=16,
        head_dim=128,
        block_size=16,
        dtype=torch.float32,
        device=torch.device(device),
    )


def sized(
    device: str,
    *,
    cache_gib: float = 40,
    device_gib: float = 64,
    host_gib: float = 64,
    **options: Any,
) -> CacheSize:
    """The size on a machine with so much free memory."""
    config = EngineConfig(**{"max_num_seqs": 8, **options})
    free = FreeMemory(
        cache=int(cache_gib * GIB), device=int(device_gib * GIB), host=int(host_gib * GIB)
    )
    return size_cache(config, spec_on(device), MAX_MODEL_LEN, free)


@pytest.mark.parametrize(
    ("device", "options", "num_blocks", "num_host_blocks", "bound"),
    [
        ("cuda", {}, 40 * 1024, 4096, "gpu_memory_utilization"),
        ("cuda", {"host_gib": 3}, 40 * 1024, 1536, "gpu_memory_utilization"),
        ("cuda", {"swap_space_gib": 0}, 40 * 1024, 0, "gpu_memory_utilization"),
        ("cuda", {"kv_cache_tokens": 1615}, 100, 4096, "kv_cache_tokens"),
        ("cuda", {"enable_prefix_caching": False}, 8 * 63, 4096, "max_num_seqs"),
        ("cuda", SMALL | {"enable_prefix_caching": False}, 256, 4096, "gpu_memory_utilization"),
        ("cpu", {}, 40 * 1024, 0, "cpu_kv_cache_gib"),
        ("cpu", {"swap_space_gib": 0.5}, 40 * 1024, 512, "cpu_kv_cache_gib"),
        ("cpu", {"swap_space_gib": 0.0005}, 40 * 1024, 0, "cpu_kv_cache_gib"),
        ("cpu", {"kv_cache_tokens": 160_000, "cache_gib": 1}, 10_000, 0, "kv_cache_tokens"),
        ("cpu", {"enable_prefix_caching": False}, 8 * 63, 0, "max_num_seqs"),
    ],
)  # fmt: skip
def test_the_size_follows_from_one_bound(
    device: str, options: dict[str, Any], num_blocks: int, num_host_blocks: int, bound: str
) -> None:
    assert spec_on(device).bytes_per_block == 2**20
    size = sized(device, **options)
    assert (size.num_blocks, size.num_host_blocks) == (num_blocks, num_host_blocks)
    assert size.bound == bound


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cuda", {"cache_gib": -3}, "0 bytes left: raise gpu_memory_utilization, or lower"),
        ("cpu", {"cache_gib": 0.0005}, "536870 bytes left: raise cpu_kv_cache_gib"),
        ("cpu", {"cpu_kv_cache_gib": 40, "device_gib": 39}, "cpu_kv_cache_gib 40 takes .*: lower"),
        ("cuda", {"kv_cache_tokens": 10**9}, "kv_cache_tokens 1000000000 takes .*: lower it"),
        ("cuda", {"swap_space_gib": 65}, r"swap_space_gib 65 is .* the 64\.00 GiB.*: lower"),
        ("cpu", {"swap_space_gib": 25}, r"swap_space_gib 25 is .* the 24\.00 GiB.*: lower"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_change(
    device: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sized(device, **options)


def test_the_summary_tells_what_fits() -> None:
    assert sized("cuda", cache_gib=1.5).summary(MAX_MODEL_LEN) == {
        "num_blocks": 1536,
        "block_size": 16,
        "num_tokens": 24_576,
        "gib": 1.5,
        "num_longest_seqs": 24,  # of 63 blocks each
        "num_host_blocks": 4096,
        "bound": "gpu_memory_utilization",
    }


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_an_engine_on_a_cpu_takes_what_it_may(enable_prefix_caching: bool) -> None:
    engine = build_engine(
        EngineConfig(
            cpu_kv_cache_gib=0.125,
            swap_space_gib=0.0625,
            max_num_seqs=1,
            max_model_len=512,
            enable_prefix_caching=enable_prefix_caching,
        )
    )
    size, cache = engine.cache_size, engine.runner.cache
    num_affordable = 2**27 // size.spec.bytes_per_block
    assert size.num_blocks == (num_affordable if enable_prefix_caching else 512 // 16)
    assert engine.pool.num_blocks == cache.num_blocks == cache.layers.shape[1] == size.num_blocks
    assert engine.runner.host_cache.num_blocks == 2**26 // size.spec.bytes_per_block


def test_a_cache_without_room_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="0 bytes left: raise cpu_kv_cache_gib"):
        build_engine(EngineConfig(cpu_kv_cache_gib=0))
    with pytest.raises(ConfigError, match=r"swap_space_gib 1000000\.0 is more than .*: lower it"):
        build_engine(EngineConfig(swap_space_gib=1e6))


def test_queues_that_are_made_anew_have_the_same_blocks() -> None:
    engine = build_engine(EngineConfig(kv_cache_tokens=160))
    again = engine.with_empty_queues()
    assert again.pool is not engine.pool
    assert again.pool.num_blocks == again.pool.num_free == 10
