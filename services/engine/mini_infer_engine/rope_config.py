"""Rotary embeddings as config.json describes them: the plain one and its scaled kinds. No torch.

Checkpoints write them in two ways: `rope_theta` beside an object `rope_scaling`, or one object
`rope_parameters` (of one such object per kind of layer where these differ). `layers/rotary.py`
computes what is read here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mini_infer_engine.architectures import FULL, SLIDING, Architecture
from mini_infer_engine.config_fields import ConfigFields

MAX_ROPE_THETA = 1e12
MAX_POSITIONS = 2**24
_MAX_FACTOR = 1e6
_SYNONYMS = {"su": "longrope"}
_OF_PHI_3 = {**_SYNONYMS, "yarn": "longrope"}
"""Early Phi-3 folders call it so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One rotary embedding; this class is the plain kind, its subclasses the scaled ones.

    Attributes:
        theta: Base of the frequencies.
        rotary_dim: Elements at the front of a head that turn.
        attention_factor: Factor of cosines and sines.
    """

    theta: float
    rotary_dim: int
    attention_factor: float = 1.0

    def max_context(self, max_position_embeddings: int) -> int:
        """Tokens of context that it reaches where the model was made for so many positions."""
        return max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope(RopeConfig):
    """Positions divided by `factor` (Chen et al., "Position Interpolation", 2023)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope(RopeConfig):
    """A base that grows with the length of the text beyond `max_positions` ("NTK-aware").

    Attributes:
        factor: How fast it grows.
        max_positions: Length up to which it is the plain kind.
    """

    factor: float
    max_positions: int

    def max_context(self, max_position_embeddings: int) -> int:
        """As `RopeConfig.max_context`."""
        return int(min(max_position_embeddings * max(self.factor, 1.0), MAX_POSITIONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope(RopeConfig):
    """Long wavelengths divided by `factor`, short ones kept (Llama 3.1's model card).

    Attributes:
        factor: Divisor of the frequencies whose wavelength is above
            `original_max_positions / low_freq_factor`.
        low_freq_factor: See there.
        high_freq_factor: Wavelengths below `original_max_positions / high_freq_factor` are kept.
        original_max_positions: Context before scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope(RopeConfig):
    """Interpolated and plain frequencies blended by dimension (Peng et al., "YaRN", 2023).

    Attributes:
        factor: Divisor of the interpolated ones.
        beta_fast: Rotations within the original context above which a dimension is kept.
        beta_slow: Rotations below which it is interpolated.
        truncate: Whether the blend's ends are whole dimensions.
        original_max_positions: Context before scaling.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_positions: int

    def max_context(self, max_position_embeddings: int) -> int:
        """As `RopeConfig.max_context`."""
        scaled = int(min(self.original_max_positions * self.factor, MAX_POSITIONS))
        return max(max_position_embeddings, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope(RopeConfig):
    """One divisor per frequency, of two sets, by the length of the text ("LongRoPE", 2024).

    Attributes:
        short_factors: [ceil(rotary_dim / 2)], for texts up to `original_max_positions`.
        long_factors: Likewise, for longer ones.
        original_max_positions: Context before scaling.
    """

    short_factors: tuple[float, ...] = field(repr=False)
    long_factors: tuple[float, ...] = field(repr=False)
    original_max_positions: int


def read_ropes(
    fields: ConfigFields, architecture: Architecture, head_dim: int, max_positions: int
) -> dict[str, RopeConfig]:
    """Reads the rotary embedding of each kind of layer.

    Args:
        fields: config.json.
        architecture: Its defaults.
        head_dim: Width of a head.
        max_positions: `max_position_embeddings`.

    Raises:
        ModelFolderError: A value is out of range or of a kind that is not supported.
    """
    theta = fields.number("rope_theta", 1, MAX_ROPE_THETA, default=architecture.rope_theta)
    scaling, parameters = fields.object("rope_scaling"), fields.object("rope_parameters")
    reader = _RopeReader(fields, architecture, head_dim, max_positions)
    if architecture.local_rope_theta is None:
        rope = reader.read(parameters if scaling.is_empty() else scaling, theta)
        return {FULL: rope, SLIDING: rope}
    local_theta = fields.number(
        "rope_local_base_freq", 1, MAX_ROPE_THETA, default=architecture.local_rope_theta
    )
    full = parameters.object(FULL) if scaling.is_empty() else scaling
    return {
        FULL: reader.read(full, theta),
        SLIDING: reader.read(parameters.object(SLIDING), local_theta),
    }


class _RopeReader:
    """Reads the objects that describe rotary embeddings."""

    def __init__(
        self, config: ConfigFields, architecture: Architecture, head_dim: int, max_positions: int
    ) -> None:
        self._config = config
        self._architecture = architecture
        self._head_dim = head_dim
        self._max_positions = max_positions

    def read(self, fields: ConfigFields, theta: float) -> RopeConfig:
        """Reads one; `theta` holds where its object has none."""
        theta = fields.number("rope_theta", 1, MAX_ROPE_THETA, default=theta)
        rotary_dim = self._rotary_dim(fields)
        match self._kind(fields):
            case "linear":
                return LinearRope(theta=theta, rotary_dim=rotary_dim, factor=self._factor(fields))
            case "dynamic":
                if rotary_dim <= 2:
                    raise fields.error("rope_type", "another kind, since heads of 2 cannot grow")
                return DynamicRope(
                    theta=theta,
                    rotary_dim=rotary_dim,
                    factor=self._factor(fields),
                    max_positions=self._max_positions,
                )
            case "llama3":
                return self._llama3(fields, theta, rotary_dim)
            case "yarn":
                return self._yarn(fields, theta, rotary_dim)
            case "longrope":
                return self._longrope(fields, theta, rotary_dim)
            case _:
                return RopeConfig(theta=theta, rotary_dim=rotary_dim)

    def _kind(self, fields: ConfigFields) -> str:
        key = "type" if fields.get("rope_type") is None else "rope_type"
        kinds = self._architecture.rope_kinds
        synonyms = _OF_PHI_3 if "longrope" in kinds else {}
        kind = fields.choice(key, (*kinds, *synonyms), default="default")
        if kind == "default" and fields.get("factor") is not None:
            raise fields.error("factor", "absent where rope_type does not say what it scales")
        return synonyms.get(kind, kind)

    def _rotary_dim(self, fields: ConfigFields) -> int:
        whole = self._config.number("partial_rotary_factor", 0, 1, default=1.0)
        part = fields.number("partial_rotary_factor", 0, 1, default=whole)
        if part != 1 and not self._architecture.has_partial_rotation:
            holder = self._config if fields.get("partial_rotary_factor") is None else fields
            raise holder.error("partial_rotary_factor", "1 or absent in this architecture")
        rotary_dim = int(self._head_dim * part)
        if rotary_dim < 1:
            raise fields.error("partial_rotary_factor", "large enough for an element to turn")
        return rotary_dim

    def _factor(self, fields: ConfigFields) -> float:
        return fields.number("factor", 0, _MAX_FACTOR)

    def _original(self, fields: ConfigFields) -> int:
        key = "original_max_position_embeddings"
        inner = fields.integer(key, 1, MAX_POSITIONS, default=self._max_positions)
        if self._architecture.local_rope_theta is not None:
            return inner
        # Beside a single object, the one outside wins.
        default = self._architecture.original_max_positions or inner
        return self._config.integer(key, 1, MAX_POSITIONS, default=default)

    def _llama3(self, fields: ConfigFields, theta: float, rotary_dim: int) -> Llama3Rope:
        low = fields.number("low_freq_factor", 0, _MAX_FACTOR)
        high = fields.number("high_freq_factor", 0, _MAX_FACTOR)
        if high <= low:
            raise fields.error("high_freq_factor", f"above the low_freq_factor {low}")
        return Llama3Rope(
            theta=theta,
            rotary_dim=rotary_dim,
            factor=self._factor(fields),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=self._original(fields),
        )

    def _yarn(self, fields: ConfigFields, theta: float, rotary_dim: int) -> YarnRope:
        original = self._original(fields)
        factor = fields.number("factor", 0, _MAX_FACTOR, default=self._max_positions / original)
        attention_factor = fields.optional_number("attention_factor", 0, _MAX_FACTOR)
        if attention_factor is None:
            attention_factor = _yarn_attention_factor(fields, factor)
        return YarnRope(
            theta=theta,
            rotary_dim=rotary_dim,
            attention_factor=attention_factor,
            factor=factor,
            beta_fast=fields.number("beta_fast", 0, _MAX_FACTOR, 32.0, low_allowed=True) or 32.0,
            beta_slow=fields.number("beta_slow", 0, _MAX_FACTOR, 1.0, low_allowed=True) or 1.0,
            truncate=fields.flag("truncate", default=True),
            original_max_positions=original,
        )

    def _longrope(self, fields: ConfigFields, theta: float, rotary_dim: int) -> LongRope:
        original = self._original(fields)
        factor = fields.number("factor", 0, _MAX_FACTOR, default=self._max_positions / original)
        attention_factor = fields.optional_number("attention_factor", 0, _MAX_FACTOR)
        if attention_factor is None:
            attention_factor = 1.0
            if factor > 1 and original > 1:
                attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
        num_frequencies = -(-rotary_dim // 2)
        return LongRope(
            theta=theta,
            rotary_dim=rotary_dim,
            attention_factor=attention_factor,
            short_factors=fields.numbers("short_factor", num_frequencies, 0, _MAX_FACTOR),
            long_factors=fields.numbers("long_factor", num_frequencies, 0, _MAX_FACTOR),
            original_max_positions=original,
        )


def _yarn_attention_factor(fields: ConfigFields, factor: float) -> float:
    """YaRN's temperature (section 3.4), or the ratio of two where the file has both weights."""
    numerator = fields.optional_number("mscale", 0, _MAX_FACTOR)
    denominator = fields.optional_number("mscale_all_dim", 0, _MAX_FACTOR)
    if numerator is None or denominator is None:
        return _temperature(factor, 1.0)
    return _temperature(factor, numerator) / _temperature(factor, denominator)


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
