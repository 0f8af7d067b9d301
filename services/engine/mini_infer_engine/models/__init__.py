"""The architectures, one a file, over the shared `layers/`."""

from __future__ import annotations

from collections.abc import Mapping

from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.models.gemma2 import Gemma2ForCausalLM
from mini_infer_engine.models.gemma3 import Gemma3ForCausalLM
from mini_infer_engine.models.llama import LlamaForCausalLM
from mini_infer_engine.models.mistral import MistralForCausalLM
from mini_infer_engine.models.phi3 import Phi3ForCausalLM
from mini_infer_engine.models.qwen2 import Qwen2ForCausalLM
from mini_infer_engine.models.qwen3 import Qwen3ForCausalLM

MODELS: Mapping[str, type[CausalLM]] = {
    model.__name__: model
    for model in (
        LlamaForCausalLM,
        MistralForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        Phi3ForCausalLM,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
    )
}
"""The code of each architecture in `mini_infer_engine.architectures.ARCHITECTURES`."""
