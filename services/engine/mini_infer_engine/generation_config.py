"""generation_config.json: which ids end an output, and what absent sampling fields mean. No torch.

Different from vLLM: where the file does not say `do_sample: true`, decoding is greedy.
"""

from __future__ import annotations

from pathlib import Path

import structlog
from mini_infer.model_folder import has_entry
from mini_infer.resolved_sampling import GenerationDefaults
from mini_infer.sampling_params import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
)

from mini_infer_engine.config_fields import ConfigFields, is_integer
from mini_infer_engine.rope_config import MAX_POSITIONS

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_EOS_TOKEN_IDS = 1024

_NEUTRAL_VALUES = {
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "diversity_penalty": (0.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": (),
    "watermarking_config": (),
}
"""Keys that change the output of `transformers` and are not applied here, with the values, null
and empty ones aside, that change nothing."""

_log = structlog.get_logger()


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Reads what a request gets where it leaves sampling fields out.

    Args:
        folder: A model folder; without generation_config.json the defaults are greedy.

    Raises:
        ModelFolderError: The file is damaged or a value is out of range.
    """
    path = folder / GENERATION_CONFIG_FILE
    if not has_entry(path):
        return GenerationDefaults()
    fields = ConfigFields.read(path)
    unused = unused_keys(fields)
    if unused:
        _log.warning("generation_config.json asks for what is not applied", keys=unused)
    temperature = fields.number("temperature", 0, MAX_TEMPERATURE, default=1.0, low_allowed=True)
    return GenerationDefaults(
        temperature=temperature if fields.flag("do_sample") else 0.0,
        top_k=fields.integer("top_k", 0, MAX_TOP_K, default=0),
        top_p=fields.number("top_p", 0, 1, default=1.0),
        max_tokens=fields.optional_integer("max_new_tokens", 1, MAX_POSITIONS),
        min_p=fields.number("min_p", 0, 1, default=0.0, low_allowed=True),
        typical_p=fields.number("typical_p", 0, 1, default=1.0),
        repetition_penalty=fields.number(
            "repetition_penalty", 0.01, MAX_REPETITION_PENALTY, default=1.0, low_allowed=True
        ),
    )


def unused_keys(fields: ConfigFields) -> list[str]:
    """Keys of a generation config that `transformers` would apply and this engine does not."""
    return [
        key
        for key, neutral in _NEUTRAL_VALUES.items()
        if fields.get(key) not in (None, [], {}, *neutral)
    ]


def read_eos_token_ids(folder: Path, config: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    """Reads the ids that end an output, from generation_config.json where it has them.

    Args:
        folder: The model folder.
        config: Its config.json, which is asked second.
        vocab_size: Ids are below it.

    Raises:
        ModelFolderError: The file is damaged or an id is out of range.
    """
    sources = [config]
    path = folder / GENERATION_CONFIG_FILE
    if has_entry(path):
        sources.insert(0, ConfigFields.read(path))
    for fields in sources:
        value = fields.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS_TOKEN_IDS:
            raise fields.error("eos_token_id", f"at most {MAX_EOS_TOKEN_IDS} ids")
        if not all(is_integer(each, 0, vocab_size - 1) for each in ids):
            raise fields.error("eos_token_id", f"ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))
    return ()
