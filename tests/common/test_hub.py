"""Hub ids: what is downloaded, what is kept, and what is served, against a stand-in Hub."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from common.stand_in_hub import SMALL, TOKEN, WAIT_S, WEIGHTS, Resolve, StandInHub
from mini_infer import Client
from mini_infer.config import bundled_model

UNWANTED = {
    "README.md": b"# Model",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"the same once more" * 1000,
    "original/model.safetensors": b"and again" * 1000,
    "modeling_custom.py": b"print('code')",
    "tf_model.h5": b"",
    "chat_template.json.exe": b"",
}


def names_in(folder: Path | None) -> set[str]:
    assert folder is not None
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_a_start_needs_is_downloaded_and_nothing_else(
    hub: StandInHub, resolve: Resolve
) -> None:
    hub.add("org/name", {**SMALL, **UNWANTED, "model.safetensors": WEIGHTS})
    found = resolve()
    assert names_in(found.folder) == {*SMALL, "model.safetensors"}
    assert sorted(hub.fetched()) == sorted({*SMALL, "model.safetensors"})
    assert found.folder is not None
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert found.progress[-1] == (len(WEIGHTS), len(WEIGHTS))


def test_shards_are_those_that_the_index_names(hub: StandInHub, resolve: Resolve) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {
        "a": shards[0],
        "b": shards[1],
        "c": shards[1],
        "d": "../../config.json",
        "e": "original/model.safetensors",
        "f": "*.safetensors",
        "g": "pytorch_model.bin",
    }
    index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    hub.add("org/name", {**SMALL, **UNWANTED, **index, shards[0]: WEIGHTS, shards[1]: b"small"})
    found = resolve()
    assert names_in(found.folder) == {*SMALL, *index, *shards}
    assert not {*UNWANTED} & {*hub.fetched()}
    assert {total for _, total in found.progress} == {len(WEIGHTS) + len(b"small")}
    assert max(done for done, _ in found.progress) == len(WEIGHTS) + len(b"small")


def test_a_tokenizer_downloads_no_weights(hub: StandInHub, resolve: Resolve) -> None:
    hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS})
    assert names_in(resolve(weights=False).folder) == {*SMALL}


WITH_LOCAL_MODEL = """
import json
from mini_infer.config import EngineConfig, TokenizerConfig
from mini_infer.hub import with_local_model

model = {"model": "org/name", "revision": "v1"}
tokenizer = with_local_model(TokenizerConfig(**model, num_encode_threads=3))
files = sorted(path.name for path in tokenizer.model_folder.iterdir())
engine = with_local_model(EngineConfig(**model))
named = with_local_model(EngineConfig(**model, served_model_name="mine"))
print(json.dumps({
    "files": files,
    "weights": (engine.model_folder / "model.safetensors").exists(),
    "same_folder": tokenizer.model == engine.model == named.model,
    "revisions": [tokenizer.revision, engine.revision],
    "names": [engine.model_name, named.model_name],
    "threads": tokenizer.num_encode_threads,
}))
"""


def test_each_process_gets_what_it_needs(hub: StandInHub, environment: dict[str, str]) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"t", "model.safetensors": WEIGHTS}
    hub.add("org/name").commit(files, "v1")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_LOCAL_MODEL],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "files": ["config.json", "tokenizer.json"],
        "weights": True,
        "same_folder": True,
        "revisions": ["", ""],
        "names": ["org/name", "mine"],
        "threads": 3,
    }


def test_what_is_here_is_not_fetched_again(hub: StandInHub, resolve: Resolve) -> None:
    hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS})
    first = resolve()
    hub.requests.clear()
    again = resolve()
    assert again.folder == first.folder
    assert hub.fetched() == []
    hub.requests.clear()
    offline = resolve(HF_HUB_OFFLINE="1")
    assert offline.folder == first.folder
    assert hub.requests == []
    unreachable = resolve(HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.folder == first.folder


def test_a_snapshot_that_another_tool_made_works_offline(hub: StandInHub, resolve: Resolve) -> None:
    """Older versions of the library keep no listing."""
    hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS})
    folder = resolve().folder
    assert folder is not None
    (listing,) = (folder.parents[1] / "trees").iterdir()
    listing.unlink()
    assert resolve(HF_HUB_OFFLINE="1").folder == folder


@pytest.mark.parametrize("resets", [False, True])
def test_a_connection_that_breaks_is_taken_up_again(
    hub: StandInHub, resolve: Resolve, resets: bool
) -> None:
    weights = WEIGHTS * 300  # The library writes, and takes up again, chunks of 10 MiB.
    hub.add("org/name", {**SMALL, "model.safetensors": weights})
    hub.cut_after["model.safetensors"] = len(weights) - 20_000
    hub.resets = resets
    found = resolve()
    assert found.folder is not None
    assert (found.folder / "model.safetensors").read_bytes() == weights
    assert found.progress[-1] == (len(weights), len(weights))
    ranges = [span for _, path, span in hub.requests if "/large/" in path]
    assert ranges == ["", "" if resets else f"bytes={10 * 2**20}-"]


def test_ctrl_c_ends_a_download_at_once(hub: StandInHub, environment: dict[str, str]) -> None:
    hub.add("org/name", {**demo_files(), "model.safetensors": WEIGHTS})
    hub.cut_after["model.safetensors"] = 20_000
    hub.stalls = True
    with subprocess.Popen(
        [sys.executable, "-m", "mini_infer.cli.main", "serve", "--port=0", "--model=org/name"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert hub.stalled.wait(WAIT_S)
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=WAIT_S)
    assert not hub.ended.is_set()
    assert (server.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_an_interrupted_download_keeps_what_is_complete(hub: StandInHub, resolve: Resolve) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = dict(zip("ab", shards, strict=True))
    index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    repository = hub.add("org/name", {**SMALL, **index, shards[0]: WEIGHTS})
    repository.listed[shards[1]] = 4
    assert "answered 404" in resolve().error
    repository.commits[repository.refs["main"]][shards[1]] = b"late"
    hub.requests.clear()
    assert shards[1] in names_in(resolve().folder)
    assert hub.fetched() == [shards[1]]


def test_a_revision_stays_what_it_was(hub: StandInHub, resolve: Resolve) -> None:
    repository = hub.add("org/name")
    old = repository.commit({**SMALL, "model.safetensors": b"old"}, "v1")
    new = repository.commit({**SMALL, "model.safetensors": b"new"}, "main")
    for revision, content, commit in (
        ("v1", b"old", old),
        ("", b"new", new),
        ("main", b"new", new),
        (old, b"old", old),
    ):
        folder = resolve(revision=revision).folder
        assert folder is not None
        assert folder.name == commit
        assert (folder / "model.safetensors").read_bytes() == content
    repository.commit({**SMALL, "model.safetensors": b"newest"}, "main")
    folder = resolve(revision=new, HF_HUB_OFFLINE="1").folder
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == b"new"


def test_the_token_goes_to_the_hub_alone(hub: StandInHub, resolve: Resolve) -> None:
    hub.add("org/name", {**SMALL, "model.safetensors": WEIGHTS})
    assert resolve(HF_TOKEN=TOKEN).folder is not None
    assert {token for _, token in hub.tokens} == {f"Bearer {TOKEN}"}
    assert "large" not in {part for part, _ in hub.tokens}


def test_nothing_of_the_hub_is_loaded_before_an_id_is_looked_up() -> None:
    modules = (
        "mini_infer.hub, mini_infer.cli.main, mini_infer_gateway.server, "
        "mini_infer_tokenizer.server, mini_infer_engine.server"
    )
    code = (
        f"import sys, {modules}\nfrom mini_infer.hub import resolve_model\nresolve_model('')\n"
        "assert not {'huggingface_hub', 'httpx2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


GENERATE = """
import json, sys
from mini_infer import EngineConfig, LLMEngine

downloads = []
with LLMEngine(
    EngineConfig(model="org/demo", revision="v1"), on_download=lambda *each: downloads.append(each)
) as engine:
    (output,) = engine.generate("Once upon a time", max_tokens=16, temperature=0.0)
    print(json.dumps([output.text, engine.config.model_name, downloads[-1:]]))
"""


def demo_files() -> dict[str, bytes]:
    folder = bundled_model("demo")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_hub_id_runs_in_process_and_is_served(
    hub: StandInHub, environment: dict[str, str]
) -> None:
    files = demo_files()
    hub.add("org/demo").commit(files, "v1")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", GENERATE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_bytes = len(files["model.safetensors"])
    text, name, last_progress = json.loads(done.stdout)
    assert (name, last_progress) == ("org/demo", [[num_bytes, num_bytes]])

    hub.requests.clear()
    command = [sys.executable, "-m", "mini_infer.cli.main", "serve", "--port=0"]
    with subprocess.Popen(
        [*command, "--model=org/demo"],
        env={**environment, "MINI_INFER_REVISION": "v1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        ready = server.stdout.readline()
        try:
            assert ready.startswith("Mini-Infer serves org/demo on "), server.stderr.read()
            with Client(ready.split()[-1]) as client:
                assert client.model_info(timeout=WAIT_S).model == "org/demo"
                stream = client.generate("Once upon a time", max_tokens=16, temperature=0.0)
                assert "".join(chunk.text for chunk in stream) == text
        finally:
            server.send_signal(signal.SIGTERM)
            log = server.stderr.read()
    assert server.returncode == 0
    assert '"event": "Loading weights"' in log
    looked_up = [path for _, path, _ in hub.requests if path.startswith("/api/models")]
    assert looked_up == ["/api/models/org/demo/revision/v1"]
