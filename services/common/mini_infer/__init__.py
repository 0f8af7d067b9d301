"""Mini-Infer: serves large language models over gRPC, or runs them in this process.

    from mini_infer import LLMEngine
    engine = LLMEngine()
    print(engine.generate(["Once upon a time"], max_tokens=50)[0].text)

Importing this package loads neither torch nor gRPC: `LLMEngine` and the clients are imported
when they are first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError, InvalidRequestError, MiniInferError
from mini_infer.sampling_params import RepetitionDetection, SamplingParams
from mini_infer.structured_output import StructuredOutput

if TYPE_CHECKING:
    from mini_infer_engine.generation import GenerationOutput
    from mini_infer_engine.llm_engine import LLMEngine

    from mini_infer.client import AsyncClient, Client

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "ConfigError",
    "EngineConfig",
    "GenerationOutput",
    "InvalidRequestError",
    "LLMEngine",
    "MiniInferError",
    "RepetitionDetection",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]

_LAZY = {
    "LLMEngine": "mini_infer_engine.llm_engine",
    "GenerationOutput": "mini_infer_engine.generation",
    "Client": "mini_infer.client",
    "AsyncClient": "mini_infer.client",
}


def __getattr__(name: str) -> Any:
    """Imports what needs torch or gRPC when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
