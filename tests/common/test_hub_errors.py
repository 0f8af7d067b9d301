"""Hub ids that cannot be had: what a person is told; and what is no Hub id at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common.stand_in_hub import SMALL, TOKEN, WAIT_S, WEIGHTS, Repository, Resolve, StandInHub
from mini_infer.config import EngineConfig, TokenizerConfig, bundled_model
from mini_infer.errors import ConfigError
from mini_infer.hub import is_hub_id, resolve_model, with_local_model


def refuse(status: int, code: str = "") -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.refusal = (status, code)

    return change


def only(**files: bytes) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.commit({name.replace("__", "."): data for name, data in files.items()})

    return change


def without(*names: str) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.commit({name: data for name, data in SMALL.items() if name not in names})

    return change


def weights_of_size(size: Any) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.commit(SMALL)
        repository.listed["model.safetensors"] = size

    return change


def index(content: bytes) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.commit({**SMALL, "model.safetensors.index.json": content})

    return change


def list_also(*names: str) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.listed |= dict.fromkeys(names, 10)

    return change


@pytest.mark.parametrize(
    ("change", "revision", "messages"),
    [
        (refuse(404, "RepoNotFound"), "", ["no folder org/name here", "check the name"]),
        (refuse(401, "RepoNotFound"), "", ["no repository org/name", "set HF_TOKEN"]),
        (refuse(401), "", ["answered 401", "HF_TOKEN"]),
        (refuse(403, "GatedRepo"), "", ["is gated: accept its terms", "set HF_TOKEN"]),
        (refuse(500), "", ["answered 500", "try again later"]),
        (only(), "v9", ["no branch, tag or commit v9", "--revision"]),
        (only(), "../main", ["'../main' is no name of a branch"]),
        (without(), "", ["neither model.safetensors nor", "pickled ones"]),
        (without("config.json"), "", ["has no config.json: choose"]),
        (
            without("config.json", "tokenizer.json"),
            "",
            ["has no config.json and no tokenizer.json: choose"],
        ),
        (weights_of_size(None), "", ["unusable answer", "a file of None bytes"]),
        (weights_of_size("5"), "", ["unusable answer", "a file of '5' bytes"]),
        (weights_of_size(1.5), "", ["unusable answer"]),
        (weights_of_size(-5), "", ["unusable answer", "a file of -5 bytes"]),
        (index(b'{"weight_map": {"a": 5}}'), "", ["weight_map must be", "Expected `str`"]),
        (index(b"{"), "", ["index.json is not valid JSON"]),
        (
            list_also("additional_chat_templates/../../../evil.jinja"),
            "",
            ["unusable answer", "choose another repository"],
        ),
    ],
    ids=lambda value: "" if callable(value) else str(value)[:40],
)
def test_what_cannot_be_had_is_one_sentence(
    hub: StandInHub,
    resolve: Resolve,
    tmp_path: Path,
    change: Callable[[Repository], None],
    revision: str,
    messages: list[str],
) -> None:
    change(hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS}))
    found = resolve(revision=revision, HF_TOKEN=TOKEN)
    for message in messages:
        assert message in found.error
    assert len(found.error.splitlines()) == 1
    assert TOKEN not in found.error + found.stderr
    outside = {path.name for path in tmp_path.iterdir()}
    assert outside <= {"hf"}
    assert not list(tmp_path.rglob("*evil*"))


IN_PROCESS = "from mini_infer import *; LLMEngine(EngineConfig(model='org/name'))"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "mini_infer.cli.main", "serve", "--port=0", "--model=org/name"],
        ["-m", "mini_infer.cli.main", "engine", "--address=ipc:///x", "--model=org/name"],
        ["-c", IN_PROCESS],
    ],
    ids=["serve", "engine", "in process"],
)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization"),
    ],
)
def test_no_weights_are_fetched_of_a_model_that_cannot_run(
    hub: StandInHub,
    environment: dict[str, str],
    arguments: list[str],
    changed: dict[str, object],
    message: str,
) -> None:
    config = json.loads((bundled_model("demo") / "config.json").read_bytes()) | changed
    files = {**SMALL, "config.json": json.dumps(config).encode(), "model.safetensors": WEIGHTS}
    files["generation_config.json"] = b"{}"
    hub.add("org/name", files)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert message in done.stderr.splitlines()[-1]
    assert arguments[0] == "-c" or (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "config.json" in hub.fetched()
    assert "model.safetensors" not in hub.fetched()


def test_without_network_nothing_is_guessed(hub: StandInHub, resolve: Resolve) -> None:
    hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS})
    assert "HF_HUB_OFFLINE is set: unset it" in resolve(HF_HUB_OFFLINE="1").error
    nowhere = resolve(HF_ENDPOINT="http://127.0.0.1:9").error
    assert "http://127.0.0.1:9 cannot be reached: try again with network" in nowhere
    resolve(weights=False)
    assert "HF_HUB_OFFLINE is set: unset it" in resolve(HF_HUB_OFFLINE="1").error


def test_a_cache_that_cannot_be_written_or_is_too_small_is_named(
    hub: StandInHub, resolve: Resolve, tmp_path: Path
) -> None:
    hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS})
    (tmp_path / "file").touch()
    found = resolve(HF_HOME=str(tmp_path / "file"))
    assert "set HF_HOME to a folder that can be written" in found.error
    hub.add("org/name", SMALL).listed["model.safetensors"] = 2**60
    assert "does not fit on the disk" in resolve().error


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", True),
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("_org/name", True),
        ("", False),
        ("name", False),
        ("./org/name", False),
        ("../name", False),
        ("~/name", False),
        ("/org/name", False),
        ("org/sub/name", False),
        ("org/..", False),
        ("org--x/name", False),
        ("org/name.git", False),
        ("org/name\n", False),
        ("örg/name", False),
        ("x" * 97 + "/name", False),
    ],
)
def test_what_a_hub_id_is(model: str, expected: bool) -> None:
    assert is_hub_id(model) is expected


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert is_hub_id("org/name")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/name")
    config = EngineConfig(model="org/name")
    assert with_local_model(config) is config


@pytest.mark.parametrize("config", [EngineConfig(revision="v1"), TokenizerConfig(revision="v1")])
def test_a_revision_needs_a_hub_id(config: EngineConfig | TokenizerConfig) -> None:
    with pytest.raises(ConfigError, match="revision v1 is of a Hub id"):
        with_local_model(config)
    with pytest.raises(ConfigError, match="the model /srv/model is a folder"):
        resolve_model("/srv/model", "v1")
