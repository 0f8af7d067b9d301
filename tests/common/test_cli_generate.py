"""`mini-infer generate` with a server whose answers the test writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common.stand_in_service import CHOICES, LOGPROBS, Script
from mini_infer.v1 import generate_pb2 as pb2

RunMain = Callable[..., tuple[int, str, str]]

SAMPLING = pb2.SamplingOptions
STRUCTURED = pb2.StructuredOutput


def asked_to_generate(script: Script) -> Any:
    """The request of the one Generate call."""
    (request,) = [each for each in script.asked if isinstance(each, pb2.GenerateRequest)]
    return request


def test_one_completion_is_printed_alone(run: RunMain, address: str, script: Script) -> None:
    code, out, err = run("generate", f"--address={address}", "Once")
    assert (code, out, err) == (0, "Once upon\n", "")
    (request,) = [each for each in script.asked if hasattr(each, "sampling")]
    assert not any(map(request.HasField, ("priority", "cache_salt")))
    assert not request.sampling.HasField("n")


def test_completions_are_printed_one_after_another(
    run: RunMain, address: str, script: Script
) -> None:
    script.responses = list(CHOICES)
    code, out, err = run("generate", f"--address={address}", "--n=2", "--stats", "Once")
    assert (code, out) == (0, "[0]\nOnce upon\n[1]\na fox\n")
    assert "5 tokens in 4 messages" in err


@pytest.mark.parametrize("priority", [-5, 0])
def test_scheduling_options_reach_the_server(
    run: RunMain, address: str, script: Script, priority: int
) -> None:
    code, _, _ = run(
        "generate", f"--address={address}", f"--priority={priority}", "--cache-salt=s", "Once"
    )
    assert code == 0
    (request,) = [each for each in script.asked if hasattr(each, "sampling")]
    assert request.HasField("priority")
    assert (request.priority, request.cache_salt) == (priority, "s")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--min-p=0.25"], {"sampling": SAMPLING(min_p=0.25)}),
        (["--typical-p=0.5"], {"sampling": SAMPLING(typical_p=0.5)}),
        (["--repetition-penalty=1.5"], {"sampling": SAMPLING(repetition_penalty=1.5)}),
        (["--presence-penalty=-0.5"], {"sampling": SAMPLING(presence_penalty=-0.5)}),
        (["--frequency-penalty=0"], {"sampling": SAMPLING(frequency_penalty=0)}),
        (
            ["--logit-bias=42=-1.5", "--logit-bias", "7=100"],
            {"sampling": SAMPLING(logit_bias={42: -1.5, 7: 100})},
        ),
        (
            ["--allowed-token-ids=4", "--allowed-token-ids=2"],
            {"sampling": SAMPLING(allowed_token_ids=[4, 2])},
        ),
        (
            ["--bad-words=a fox", "--bad-words=moon"],
            {"sampling": SAMPLING(bad_words=["a fox", "moon"])},
        ),
        (
            ["--stop=end", "--stop=\n"],
            {"stopping": pb2.StoppingOptions(stop=["end", "\n"])},
        ),
        (
            ["--repetition-detection=64:4"],
            {
                "stopping": pb2.StoppingOptions(
                    repetition_detection=pb2.RepetitionDetection(
                        min_period=1, max_period=64, num_repeats=4
                    )
                )
            },
        ),
        (
            ["--repetition-detection=2:64:4"],
            {
                "stopping": pb2.StoppingOptions(
                    repetition_detection=pb2.RepetitionDetection(
                        min_period=2, max_period=64, num_repeats=4
                    )
                )
            },
        ),
        (
            ["--logprobs=0", "--prompt-logprobs=3"],
            {"output": pb2.OutputOptions(logprobs=0, prompt_logprobs=3)},
        ),
        (["--json-schema={}"], {"structured_output": STRUCTURED(json_schema="{}")}),
        (["--json-object"], {"structured_output": STRUCTURED(json_object=True)}),
        (["--no-json-object"], {}),
        (["--regex=@a*"], {"structured_output": STRUCTURED(regex="@a*")}),
        (["--grammar=start: x"], {"structured_output": STRUCTURED(grammar="start: x")}),
        (
            ["--choice=yes", "--choice=no"],
            {"structured_output": STRUCTURED(choice=pb2.Choices(texts=["yes", "no"]))},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sampling_options_reach_the_server(
    run: RunMain, address: str, script: Script, flags: list[str], expected: dict[str, Any]
) -> None:
    assert run("generate", f"--address={address}", *flags, "Once")[0] == 0
    assert asked_to_generate(script) == pb2.GenerateRequest(text="Once", **expected)


@pytest.mark.parametrize("name", ["json_schema", "grammar"])
def test_language_is_read_from_a_file(
    run: RunMain, address: str, script: Script, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "language"
    file.write_text("né 🙂\n", encoding="utf-8")
    flag = f"--{name.replace('_', '-')}=@{file}"
    assert run("generate", f"--address={address}", flag, "Once")[0] == 0
    assert getattr(asked_to_generate(script).structured_output, name) == "né 🙂\n"


def test_two_languages_are_refused_in_one_sentence(run: RunMain, address: str) -> None:
    code, out, err = run("generate", f"--address={address}", "--regex=a", "--json-object", "Once")
    assert (code, out) == (2, "")
    assert err == ("mini-infer: structured_output: expected one language, got json_object, regex\n")


def test_logprobs_are_printed_behind_the_text(run: RunMain, address: str, script: Script) -> None:
    script.responses = list(LOGPROBS)
    code, out, err = run("generate", f"--address={address}", "--n=2", "Once")
    assert (code, err) == (0, "")
    assert (
        out
        == """[0]
Once upon
  prompt   logprob   rank  likeliest
       1    -0.500      1
       2    -3.000     70
token id   logprob   rank  likeliest
       1    -0.250      1  1 (-0.250), 9 (-1.500)
       2    -4.000   1200  8 (-0.125), 7 (-2.000)
       3      -inf   4096  3 (0.000)
[1]
a fox
"""
    )
