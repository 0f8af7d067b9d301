"""Fills the config dataclasses from flags, the environment and a YAML file, in this order.

The fields of `EngineConfig`, `TokenizerConfig` and `GatewayConfig` are the only list of settings:
a field `max_num_seqs` is the flag `--max-num-seqs`, the variable `MINI_INFER_MAX_NUM_SEQS` and the
YAML key `max_num_seqs`. One flat file may hold the settings of all three processes; each takes
its own. This is the only module that reads the environment.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mini_infer.config import EngineConfig, GatewayConfig, TokenizerConfig
from mini_infer.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ENV_PREFIX = "MINI_INFER_"
CONFIG_FILE_VARIABLE = f"{ENV_PREFIX}CONFIG"
MASK = "****"

_CONFIG_CLASSES: tuple[type[DataclassInstance], ...] = (
    EngineConfig,
    TokenizerConfig,
    GatewayConfig,
)

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it came from; `shown` is the value with secrets masked."""

    name: str
    shown: object
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded(Generic[ConfigT]):
    """A config and the origin of each of its values."""

    config: ConfigT
    settings: tuple[Setting, ...]


def load(
    config_class: type[ConfigT],
    flags: Mapping[str, Any] | None = None,
    config_file: Path | None = None,
) -> Loaded[ConfigT]:
    """Makes the config of one process.

    Args:
        config_class: A dataclass whose fields are the settings; a field with the metadata
            `{"secret": True}` is never shown.
        flags: Values from the command line, by field name; only those that were given.
        config_file: A YAML file; without it, the one that `MINI_INFER_CONFIG` names, if any.

    Raises:
        ConfigError: For an unknown key, or values that cannot be parsed or are out of range.
    """
    flags = flags or {}
    file, file_values = _read_file(config_file)
    settings_class = _settings_class(config_class, file_values)
    from_environment = EnvSettingsSource(settings_class)()
    origins = {}
    for name in (field.name for field in fields(config_class)):
        if name in flags:
            origins[name] = f"flag {flag_name(name)}"
        elif name in from_environment:
            origins[name] = f"environment {ENV_PREFIX}{name.upper()}"
        else:
            origins[name] = f"file {file}" if name in file_values else "default"
    try:
        values = dict(settings_class(**flags))
    except ValidationError as error:
        raise ConfigError(_explain(config_class, error, origins)) from None
    config = config_class(**values)
    return Loaded(config, tuple(_settings(config, origins)))


def format_settings(settings: Sequence[Setting]) -> str:
    """The settings as a YAML file whose comments name the origins."""
    lines = [f"{each.name}: {json.dumps(each.shown)}" for each in settings]
    width = max(map(len, lines), default=0)
    return "\n".join(
        f"{line:{width}}  # {each.origin}" for line, each in zip(lines, settings, strict=True)
    )


def socket_folders() -> list[Path]:
    """Where sockets of this user may be, the best choice first."""
    named = (os.environ.get("TMPDIR", ""), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp")
    return list(dict.fromkeys(Path(each) for each in named if each.startswith("/")))


def time_zone() -> str | None:
    """The time zone that this user's processes shall keep, where one is named."""
    return os.environ.get("TZ")


def flag_name(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def _settings_class(
    config_class: type[DataclassInstance], file_values: Mapping[str, object]
) -> type[BaseSettings]:
    """A pydantic-settings class with the fields of a dataclass."""

    class Layers(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", protected_namespaces=()
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            in_file = InitSettingsSource(settings_cls, dict(file_values))
            return init_settings, env_settings, in_file

    hints = get_type_hints(config_class)
    definitions: dict[str, Any] = {
        field.name: (_parsed_type(hints[field.name]), field.default)
        for field in fields(config_class)
    }
    return create_model(config_class.__name__, __base__=Layers, **definitions)


def _parsed_type(hint: Any) -> Any:
    """Tuples may also be written as one string with commas."""
    if get_origin(hint) is not tuple:
        return hint
    return Annotated[hint, NoDecode, BeforeValidator(_split_commas)]


def _split_commas(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _read_file(config_file: Path | None) -> tuple[Path | None, dict[str, object]]:
    named = os.environ.get(CONFIG_FILE_VARIABLE)
    file = config_file or (Path(named) if named else None)
    if file is None:
        return None, {}
    try:
        values = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the config file {file}: {reason}") from None
    except RuntimeError:  # of expanduser
        raise ConfigError(f"cannot read the config file {file}: there is no such user") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day like 2026-02-31
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"the config file {file}{line} is not valid YAML") from None
    if values is None:
        return file, {}
    if not isinstance(values, dict):
        raise ConfigError(f"the config file {file} must hold lines like `port: 50051`")
    _refuse_unknown(file, values)
    return file, values


def _refuse_unknown(file: Path, values: Mapping[object, object]) -> None:
    known = {field.name for each in _CONFIG_CLASSES for field in fields(each)}
    for key in values:
        if key not in known:
            alike = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {alike[0]}?" if alike else "see mini-infer serve --print-config"
            raise ConfigError(f"the config file {file} has the unknown key {key}: {hint}")


def _settings(config: DataclassInstance, origins: Mapping[str, str]) -> Iterable[Setting]:
    for field in fields(config):
        value = getattr(config, field.name)
        shown = MASK if _is_secret(field) and value else value
        yield Setting(field.name, shown, origins[field.name])


def _explain(
    config_class: type[DataclassInstance], error: ValidationError, origins: Mapping[str, str]
) -> str:
    """All values that could not be parsed, in one sentence."""
    secrets = {field.name for field in fields(config_class) if _is_secret(field)}
    problems = []
    for each in error.errors():
        name = str(each["loc"][0])
        expected = each["msg"].split(",")[0].replace("Input should be", "expected")
        given = MASK if name in secrets else repr(each["input"])
        problems.append(f"{name} ({origins[name]}): {expected}, got {given}")
    return "; ".join(problems)


def _is_secret(field: Field[Any]) -> bool:
    return bool(field.metadata.get("secret"))
