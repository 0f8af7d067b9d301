"""Settings of each process as frozen dataclasses, checked without disk, GPU or environment.

Values come from flags, the environment and YAML through `settings.py`; what is derived from a
checkpoint (data type, number of blocks) is computed elsewhere, so no config is ever mutated.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from mini_infer.errors import ConfigError

DEFAULT_PORT = 50051
DEVICES = ("auto", "cpu", "cuda")
DUMMY = "dummy"
LOAD_FORMATS = ("safetensors", DUMMY)
DTYPES = ("auto", "float32", "float16", "bfloat16")

_PACKAGED_MODELS = Path(__file__).parent / "bundled_models"
_REPOSITORY_MODELS = Path(__file__).parents[3] / "models"


def bundled_model(name: str) -> Path:
    """Folder of a model that ships with the project, in a wheel or in a checkout.

    Args:
        name: "demo" or "demo-draft".
    """
    packaged = _PACKAGED_MODELS / name
    return packaged if packaged.is_dir() else _REPOSITORY_MODELS / name


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """An engine: the model, how much it may hold, and what it runs on.

    Attributes:
        model: Model folder, or the id of a model on the Hugging Face Hub, such as org/name;
            empty means the demo model.
        revision: Branch, tag or commit of a Hub id; empty means the branch "main".
        served_model_name: Name that clients may give; empty means the Hub id or the folder's
            name.
        max_num_seqs: Sequences in a step at most.
        block_size: Tokens in a block of the KV cache.
        max_num_batched_tokens: Tokens computed in a step at most; a longer prompt takes several.
        max_model_len: Tokens of prompt and output together; unset means what the model was made
            for (`max_position_embeddings`).
        kv_cache_tokens: Tokens that the KV cache holds; unset sizes it from free memory.
        gpu_memory_utilization: Share of the GPU's memory that weights, KV cache, the largest step
            and captured steps may take together.
        cpu_kv_cache_gib: GiB that the KV cache may take on a CPU. Only what is written takes
            memory.
        swap_space_gib: GiB of the host's memory for blocks of preempted sequences; unset means 4
            on CUDA, or half of what is free, and 0 on a CPU, where it is the same memory as the
            cache's.
        kv_watermark: Share of the KV cache's blocks that stay free when a new request joins, for
            the growth of those that run.
        enable_prefix_caching: Whether the blocks of ended requests are kept until they are needed
            otherwise, so that prompts that begin alike are computed once.
        max_queued_requests: Requests that wait at most, each choice of one counted; one more is
            refused with QUEUE_FULL.
        max_queued_tokens: Tokens of the prompts that wait at most; a request beyond it is refused
            with QUEUE_FULL. Unset means no such bound.
        target_itl_ms: Milliseconds that a step shall take at most while streams decode: fewer
            prompt tokens are computed beside them then. Unset means that
            `max_num_batched_tokens` alone bounds a step.
        priority_ageing_s: A waiting request rises by one priority class for every so many
            seconds, so that none waits for ever.
        device: "auto" takes CUDA where there is one.
        dtype: Of weights and KV cache; "auto" means the checkpoint's on CUDA, float32 on a CPU.
        load_format: "safetensors" reads the checkpoint; "dummy" draws weights from a fixed seed on
            the device instead, for measurements of a shape of which there is only config.json.
        enforce_eager: Whether steps on CUDA run kernel by kernel in place of CUDA graphs: slower,
            for debugging.
        num_threads: Threads of matrix products on a CPU, for the whole process. 0 leaves them
            to torch; but the engine process takes one for a small model, because gateway and
            tokenizer share the cores, and threads that wait for each other lose more than they
            win.
    """

    model: str = ""
    revision: str = ""
    served_model_name: str = ""
    max_num_seqs: int = 64
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.95
    cpu_kv_cache_gib: float = 1.0
    swap_space_gib: float | None = None
    kv_watermark: float = 0.01
    enable_prefix_caching: bool = True
    max_queued_requests: int = 4096
    max_queued_tokens: int | None = None
    target_itl_ms: float | None = None
    priority_ageing_s: float = 30.0
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "safetensors"
    enforce_eager: bool = False
    num_threads: int = 0

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: With all values that are out of range.
        """
        problems = [
            *_url("model", self.model),
            *_below("max_num_seqs", self.max_num_seqs, 1),
            *_below("block_size", self.block_size, 1),
            *_below("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs),
            *_below("max_model_len", self.max_model_len, 2),
            *_below("kv_cache_tokens", self.kv_cache_tokens, self.block_size),
            *_not_from("cpu_kv_cache_gib", self.cpu_kv_cache_gib, 0),
            *_not_from("swap_space_gib", self.swap_space_gib, 0),
            *_below("max_queued_requests", self.max_queued_requests, 1),
            *_below("max_queued_tokens", self.max_queued_tokens, 1),
            *_not_from("target_itl_ms", self.target_itl_ms, 0.1),
            *_not_from("priority_ageing_s", self.priority_ageing_s, 0.1),
            *_below("num_threads", self.num_threads, 0),
            *_not_in("device", self.device.split(":")[0], DEVICES),
            *_not_in("dtype", self.dtype, DTYPES),
            *_not_in("load_format", self.load_format, LOAD_FORMATS),
        ]
        if not 0 < self.gpu_memory_utilization <= 1:
            given = self.gpu_memory_utilization
            problems.append(f"gpu_memory_utilization must be above 0 and at most 1, got {given}")
        if not 0 <= self.kv_watermark < 1:
            problems.append(f"kv_watermark must be at least 0 and below 1, got {self.kv_watermark}")
        _raise_if_any(problems)

    @property
    def model_folder(self) -> Path:
        """The model folder, the demo model's where none is set.

        Of a Hub id there is one only after `mini_infer.hub.with_local_model`.
        """
        return _folder(self.model)

    @property
    def model_name(self) -> str:
        """The name that clients may give."""
        return self.served_model_name or os.path.basename(os.path.realpath(self.model_folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer process.

    Attributes:
        model: Model folder, or the id of a model on the Hugging Face Hub, such as org/name;
            empty means the demo model.
        revision: Branch, tag or commit of a Hub id; empty means the branch "main".
        num_encode_threads: Threads that encode prompts beside the detokenizing loop.
        num_template_processes: Processes that render chat templates.
    """

    model: str = ""
    revision: str = ""
    num_encode_threads: int = 2
    num_template_processes: int = 2

    def __post_init__(self) -> None:
        """Checks every value."""
        problems = [
            *_url("model", self.model),
            *_below("num_encode_threads", self.num_encode_threads, 1),
            *_below("num_template_processes", self.num_template_processes, 1),
        ]
        _raise_if_any(problems)

    @property
    def model_folder(self) -> Path:
        """The model folder, the demo model's where none is set.

        Of a Hub id there is one only after `mini_infer.hub.with_local_model`.
        """
        return _folder(self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """A gateway.

    Attributes:
        host: Address to listen on; any but loopback needs `insecure`.
        port: TCP port; 0 takes a free one.
        insecure: Allow clients from other machines without TLS and tokens.
        engine_addresses: ZeroMQ addresses of the engines.
        tokenizer_addresses: ZeroMQ addresses of the tokenizer processes.
        max_prompt_bytes: Text prompts above it are refused with PROMPT_TOO_LARGE.
        max_message_bytes: Receive limit of gRPC.
        max_concurrent_requests: Generate calls at a time; one more is refused with QUEUE_FULL.
        drain_grace_s: How long running streams may go on after SIGTERM.
        write_stall_s: A stream whose client reads nothing for so long ends as SLOW_CONSUMER.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    insecure: bool = False
    engine_addresses: tuple[str, ...] = ()
    tokenizer_addresses: tuple[str, ...] = ()
    max_prompt_bytes: int = 4 * 2**20
    max_message_bytes: int = 16 * 2**20
    max_concurrent_requests: int = 4096
    drain_grace_s: float = 30.0
    write_stall_s: float = 30.0

    def __post_init__(self) -> None:
        """Checks every value."""
        problems = [
            *_below("max_prompt_bytes", self.max_prompt_bytes, 1),
            *_below("max_message_bytes", self.max_message_bytes, self.max_prompt_bytes),
            *_below("max_concurrent_requests", self.max_concurrent_requests, 1),
            *_below("drain_grace_s", self.drain_grace_s, 0),
            *_below("write_stall_s", self.write_stall_s, 0.1),
        ]
        if not 0 <= self.port <= 65535:
            problems.append(f"port must be 0 to 65535, got {self.port}")
        if not self.insecure and self.host not in ("127.0.0.1", "::1", "localhost"):
            problems.append(
                f"host {self.host} is reachable from other machines and this server has no TLS "
                "yet: pass --insecure if the network is trusted"
            )
        _raise_if_any(problems)


def _folder(model: str) -> Path:
    if not model:
        return bundled_model("demo")
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise ConfigError(f"model {model}: there is no such user; pass the whole path") from None


def _url(name: str, value: str) -> list[str]:
    scheme, _, rest = value.partition("://")
    if not rest or "/" in scheme:
        return []
    # A URL may carry a password: no error repeats more of it than the id.
    organization_and_name = [part for part in rest.split("/")[1:3] if part]
    hub_id = "/".join(organization_and_name) if len(organization_and_name) == 2 else "org/name"
    return [f"{name} must be a folder or a Hub id, got a URL: pass {hub_id:.96}"]


def _below(name: str, value: float | None, least: float) -> list[str]:
    if value is None or value >= least:
        return []
    return [f"{name} must be at least {least}, got {value}"]


def _not_from(name: str, value: float | None, least: float) -> list[str]:
    if value is None or least <= value < math.inf:
        return []
    return [f"{name} must be a finite number of at least {least}, got {value}"]


def _not_in(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    return [] if value in allowed else [f"{name} must be one of {', '.join(allowed)}, got {value}"]


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise ConfigError("; ".join(problems))
