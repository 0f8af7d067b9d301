"""What the commands that run servers have in common: settings, log level, life-time.

Only options that were really given count as flags: the rest is left to the environment and the
config file (`mini_infer.settings`).
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import typer

from mini_infer.cli.options import field_options, option, take_given, with_options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from mini_infer.config import EngineConfig, TokenizerConfig

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
ModelConfigT = TypeVar("ModelConfigT", "EngineConfig", "TokenizerConfig")

LogLevel = Literal["debug", "info", "warning", "error"]

_SERVER_OPTIONS = (
    option(
        "config",
        Path | None,
        "YAML file of settings; also MINI_INFER_CONFIG.",
        metavar="FILE",
    ),
    option("print_config", bool, "Print each setting and its origin, then exit.", False),
    option("log_level", LogLevel, "Least level that is logged.", "info"),
    option("parent", int | None, "End when this process ends.", hidden=True),
)


@dataclass(frozen=True, slots=True)
class Flags:
    """The settings that a command line gives, for this process and for those it starts."""

    values: Mapping[str, Any]
    config_file: Path | None
    log_level: LogLevel

    def load(self, config_class: type[ConfigT]) -> ConfigT:
        """Makes a config of these flags, the environment and the config file."""
        from mini_infer.settings import load

        return load(config_class, self._of(config_class), self.config_file).config

    def load_local(self, config_class: type[ModelConfigT]) -> ModelConfigT:
        """As `load`; a model that is named by its Hub id is downloaded and becomes a folder."""
        from mini_infer.cli.progress import byte_progress
        from mini_infer.config import EngineConfig
        from mini_infer.hub import Check, with_local_model

        config = self.load(config_class)
        check: Check | None = None
        if config_class is EngineConfig:
            from mini_infer_engine.model_config import read_model_config

            check = read_model_config
        with byte_progress(f"Downloading {config.model}") as on_progress:
            return with_local_model(config, on_progress, check)

    def describe(
        self, config_classes: Iterable[type[DataclassInstance]], names: Collection[str]
    ) -> str:
        """These settings of the configs, with their origins."""
        from mini_infer.settings import format_settings, load

        by_name = {
            setting.name: setting
            for each in config_classes
            for setting in load(each, self._of(each), self.config_file).settings
        }
        return format_settings([by_name[name] for name in names])

    def arguments(
        self, config_class: type[DataclassInstance], replaced: Mapping[str, Any]
    ) -> list[str]:
        """The same flags on the command line of another process.

        Args:
            config_class: What that process takes.
            replaced: Flags that it gets beside these, or in place of them.
        """
        arguments = [f"--log-level={self.log_level}"]
        if self.config_file:
            arguments.append(f"--config={self.config_file}")
        for name, value in {**self._of(config_class), **replaced}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                given = value if isinstance(value, list) else [value]
                arguments.extend(f"--{flag}={each}" for each in given)
        return arguments

    def _of(self, config_class: type[DataclassInstance]) -> dict[str, Any]:
        names = {each.name for each in fields(config_class)}
        return {name: value for name, value in self.values.items() if name in names}


def takes_settings(
    *config_classes: type[DataclassInstance], omit: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of some configs and those of every server.

    Args:
        config_classes: Whose fields become options; a field that two of them share is one.
        omit: Fields that the command sets by itself.

    Returns:
        A decorator; the command gets its `Flags` as the first argument.
    """
    by_name: dict[str, inspect.Parameter] = {}
    for config_class in config_classes:
        for each in field_options(config_class, omit):
            by_name.setdefault(each.name, each)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(ctx: typer.Context, **arguments: Any) -> None:
            values = take_given(ctx, arguments, by_name.values())
            server = {each.name: arguments.pop(each.name) for each in _SERVER_OPTIONS}
            flags = Flags(values, server["config"], server["log_level"])
            if server["print_config"]:
                typer.echo(flags.describe(config_classes, by_name))
                return
            _begin(command.__name__, flags.log_level, server["parent"])
            command(flags, **arguments)

        return with_options(run, command, [*by_name.values(), *_SERVER_OPTIONS])

    return decorate


def _begin(process: str, log_level: LogLevel, parent_pid: int | None) -> None:
    from mini_infer import logs
    from mini_infer.supervisor import end_with_parent

    logs.configure(process, log_level)
    if parent_pid is not None:
        # `serve` has children to stop and a folder to remove.
        death_signal = signal.SIGTERM if process == "serve" else signal.SIGKILL
        end_with_parent(parent_pid, death_signal)
