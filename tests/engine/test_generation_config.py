import json
from pathlib import Path

import pytest
from mini_infer.errors import ModelFolderError
from mini_infer.resolved_sampling import GenerationDefaults
from mini_infer_engine.generation_config import read_generation_defaults


def write_generation_config(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, GenerationDefaults()),
        ({"do_sample": False, "temperature": 0.7}, GenerationDefaults()),
        ({"temperature": 0.7, "top_p": 0.9}, GenerationDefaults(top_p=0.9)),
        ({"do_sample": True}, GenerationDefaults(temperature=1.0)),
        ({"do_sample": True, "temperature": 0}, GenerationDefaults()),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "max_new_tokens": 2048,
                "min_p": 0.05,
                "typical_p": 0.9,
                "repetition_penalty": 1.1,
            },
            GenerationDefaults(
                temperature=0.6,
                top_k=20,
                top_p=0.95,
                max_tokens=2048,
                min_p=0.05,
                typical_p=0.9,
                repetition_penalty=1.1,
            ),
        ),
        ({"do_sample": None, "top_k": None, "max_new_tokens": None}, GenerationDefaults()),
    ],
)
def test_generation_defaults(
    tmp_path: Path, values: dict[str, object], expected: GenerationDefaults
) -> None:
    assert read_generation_defaults(write_generation_config(tmp_path, **values)) == expected


def test_generation_defaults_without_a_file(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", "yes"),
        ("do_sample", 1),
        *(("temperature", value) for value in (-0.1, 100.5, float("nan"), float("inf"), "0.7")),
        *(("top_p", value) for value in (0, -0.5, 1.01, float("nan"), True)),
        *(("top_k", value) for value in (-1, 2**31, 1.5, True, "50")),
        *(("min_p", value) for value in (-0.1, 1.1, "0.1")),
        *(("typical_p", value) for value in (0, 1.1)),
        *(("repetition_penalty", value) for value in (0, -1, 101, "1.1")),
        *(("max_new_tokens", value) for value in (0, -1, 1.5, 10**20)),
    ],
)
def test_bad_generation_default_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    write_generation_config(tmp_path, **{key: value})
    with pytest.raises(ModelFolderError, match=rf"generation_config\.json: {key} must be"):
        read_generation_defaults(tmp_path)


def test_what_is_not_applied_is_told_at_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "suppress_tokens": [], "top_h": None}
    read_generation_defaults(write_generation_config(tmp_path, **neutral))
    assert capsys.readouterr().out == ""
    read_generation_defaults(
        write_generation_config(tmp_path, no_repeat_ngram_size=3, suppress_tokens=[7], top_k=20)
    )
    warning = capsys.readouterr().out
    assert "no_repeat_ngram_size" in warning
    assert "suppress_tokens" in warning
    assert "top_k" not in warning
