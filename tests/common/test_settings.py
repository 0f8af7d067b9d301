"""Where settings come from, and what is said about bad ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from mini_infer.config import EngineConfig, GatewayConfig, TokenizerConfig
from mini_infer.errors import ConfigError
from mini_infer.settings import MASK, Loaded, format_settings, load, socket_folders


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "mini-infer.yaml"


def origins(loaded: Loaded[EngineConfig]) -> dict[str, str]:
    return {each.name: each.origin for each in loaded.settings}


@pytest.mark.parametrize("config_class", [EngineConfig, TokenizerConfig, GatewayConfig])
def test_without_sources_the_defaults_hold(config_class: type[EngineConfig]) -> None:
    loaded = load(config_class)
    assert loaded.config == config_class()
    assert {each.origin for each in loaded.settings} == {"default"}


def test_flag_beats_environment_beats_file_beats_default(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text("max_num_seqs: 1\nblock_size: 1\ndevice: cpu\n")
    monkeypatch.setenv("MINI_INFER_MAX_NUM_SEQS", "2")
    monkeypatch.setenv("MINI_INFER_BLOCK_SIZE", "2")
    loaded = load(EngineConfig, {"max_num_seqs": 3}, config_file)
    config = loaded.config
    assert (config.max_num_seqs, config.block_size, config.device) == (3, 2, "cpu")
    told = origins(loaded)
    assert told["max_num_seqs"] == "flag --max-num-seqs"
    assert told["block_size"] == "environment MINI_INFER_BLOCK_SIZE"
    assert told["device"] == f"file {config_file}"
    assert told["dtype"] == "default"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", "/models/llama", "/models/llama"),
        ("revision", "v1.0", "v1.0"),
        ("max_model_len", "2048", 2048),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("swap_space_gib", "2.5", 2.5),
        ("enable_prefix_caching", "false", False),
        ("max_queued_tokens", "100000", 100_000),
    ],
)
def test_environment_is_parsed_by_type(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"MINI_INFER_{name.upper()}", text)
    assert getattr(load(EngineConfig).config, name) == value


def test_booleans_and_lists_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_INFER_INSECURE", "true")
    monkeypatch.setenv("MINI_INFER_ENGINE_ADDRESSES", "ipc:///run/a, ipc:///run/b")
    config = load(GatewayConfig).config
    assert config.insecure is True
    assert config.engine_addresses == ("ipc:///run/a", "ipc:///run/b")


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_INFER_PORT", "")
    assert load(GatewayConfig).config == GatewayConfig()


def test_one_file_serves_all_processes(config_file: Path) -> None:
    config_file.write_text("port: 7000\nmax_num_seqs: 8\nengine_addresses: [ipc:///run/a]\n")
    assert load(GatewayConfig, config_file=config_file).config.port == 7000
    assert load(EngineConfig, config_file=config_file).config.max_num_seqs == 8


def test_no_two_processes_mean_different_things_by_one_setting() -> None:
    """What they share must have one meaning: a flat file sets it for both."""
    names = [
        each.name
        for config_class in (EngineConfig, TokenizerConfig, GatewayConfig)
        for each in fields(config_class)
    ]
    assert {name for name in names if names.count(name) > 1} == {"model", "revision"}


def test_the_environment_names_the_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file.write_text("port: 7000\n")
    monkeypatch.setenv("MINI_INFER_CONFIG", str(config_file))
    assert load(GatewayConfig).config.port == 7000


def test_an_empty_file_sets_nothing(config_file: Path) -> None:
    config_file.write_text("# nothing yet\n")
    assert load(GatewayConfig, config_file=config_file).config == GatewayConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_num_sequences: 1\n", r"unknown key max_num_sequences: did you mean max_num_seqs\?"),
        (b"colour: blue\n", "unknown key colour: see .*--print-config"),
        (b"port: [1\n", "is not valid YAML"),
        (b"port: 2026-02-31\n", "is not valid YAML"),
        (b"- port\n", "must hold lines like `port: 50051`"),
        (b"\xff\xfe\xfa", "is not UTF-8"),
        (b"port: many\n", r"port \(file .*\): expected a valid integer, got 'many'"),
        (b"port: 70000\n", "port must be 0 to 65535, got 70000"),
    ],
)
def test_a_bad_file_is_one_sentence(config_file: Path, content: bytes, message: str) -> None:
    config_file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(GatewayConfig, config_file=config_file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "refused", "admitted"),
    [
        ("swap_space_gib", [-0.1, math.inf, math.nan], [None, 0.0, 0.5]),
        ("cpu_kv_cache_gib", [-1.0, math.inf, math.nan], [0.0, 64.0]),
        ("kv_watermark", [-0.01, 1.0, math.nan], [0.0, 0.99]),
        ("max_queued_tokens", [0, -1], [None, 1]),
        ("target_itl_ms", [0.0, -5.0, math.inf, math.nan], [None, 0.1, 50.0]),
        ("priority_ageing_s", [0.0, -5.0, math.inf, math.nan], [0.1, 30.0]),
    ],
)
def test_values_of_the_scheduler_and_its_memory_make_sense(
    name: str, refused: list[float], admitted: list[float | None]
) -> None:
    for value in refused:
        with pytest.raises(ConfigError, match=f"^{name} must be .*got {value}$"):
            load(EngineConfig, {name: value})
    for value in admitted:
        assert getattr(load(EngineConfig, {name: value}).config, name) == value


def test_a_missing_file_is_named(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot read the config file {config_file}: No such"):
        load(GatewayConfig, config_file=config_file)


def test_a_home_that_nobody_has_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="config file ~nouser/x: there is no such user"):
        load(GatewayConfig, config_file=Path("~nouser/x"))
    for config_class in (EngineConfig, TokenizerConfig):
        with pytest.raises(ConfigError, match="model ~nouser/x: there is no such user"):
            _ = load(config_class, {"model": "~nouser/x"}).config.model_folder


def test_a_model_may_be_a_link_to_itself(tmp_path: Path) -> None:
    """Its name is asked for before anybody reads it, and says what is wrong."""
    link = tmp_path / "loop"
    link.symlink_to(link)
    assert EngineConfig(model=str(link)).model_name == "loop"


def test_sockets_go_where_the_user_wants_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert socket_folders() == [Path("/scratch"), Path("/run/user/1000"), Path("/tmp")]
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "not/absolute")
    assert socket_folders() == [Path("/tmp")]


def test_all_values_that_cannot_be_parsed_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINI_INFER_PORT", "tcp://10.0.0.1:50051")
    expected = (
        r"host \(flag --host\): expected a valid string, got 5; "
        r"port \(environment MINI_INFER_PORT\): expected a valid integer, got 'tcp://10.0.0.1:50051'"
    )
    with pytest.raises(ConfigError, match=expected):
        load(GatewayConfig, {"host": 5})


def test_settings_print_as_a_file_that_can_be_read_back(config_file: Path) -> None:
    loaded = load(GatewayConfig, {"port": 7000, "engine_addresses": ["ipc:///run/a"]})
    config_file.write_text(format_settings(loaded.settings))
    assert load(GatewayConfig, config_file=config_file).config == loaded.config


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretConfig:
    """A config with something that nobody may see.

    Attributes:
        password: The secret.
        attempts: How often it may be wrong.
    """

    password: str = field(default="", metadata={"secret": True})
    attempts: int = 3


def test_secrets_are_loaded_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_INFER_PASSWORD", "hunter2")
    loaded = load(SecretConfig)
    assert loaded.config.password == "hunter2"
    shown = format_settings(loaded.settings)
    assert "hunter2" not in shown
    assert f'password: "{MASK}"' in shown


def test_secrets_are_not_shown_in_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        load(SecretConfig, {"password": ["hunter2"]})
    assert "hunter2" not in str(caught.value)


def test_the_environment_is_read_here_alone() -> None:
    """Everything else takes its settings as arguments."""
    services = Path(__file__).parents[2] / "services"
    readers = {
        path.name
        for path in services.glob("*/mini_infer*/**/*.py")
        if any(word in path.read_text() for word in ("os.environ", "os.getenv", "envvar="))
    }
    assert readers == {"settings.py"}
