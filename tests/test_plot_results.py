"""What `benchmarks/plot_results.py` draws, of figures that were made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import plot_results
from plot_results import (
    COLOURS,
    FA3,
    OURS,
    PICTURES,
    VLLM,
    draw_decode_attention,
    draw_kernel_limits,
    draw_throughput,
)

ORIGIN = {
    "gpu": "a GPU",
    "versions": {"torch": "2.11.0"},
    "date": "2026-01-02T03:04:05+00:00",
}
LOAD = {"shape": "small", "num_requests": 3, "prompt_len": 4, "output_len": 5}
THROUGHPUT = [
    {**LOAD, "tokens_per_s": 90, "least": 80, "most": 95, "vllm_tokens_per_s": 60.0},
    {**LOAD, "tokens_per_s": 50, "least": 49, "most": 51},
]
LATENCY = [
    {
        "shape": "small",
        "prompt_len": 4,
        **dict.fromkeys(("ms_per_token", "least", "most"), 1.5),
        **dict.fromkeys(("ttft_ms", "ttft_least", "ttft_most"), 9.0),
    }
]
ATTENTION = [
    {"op": "attention", "case": "small", "batch": 2, "context": 512, "ours_us": 20, "fa3_us": 40},
    {"op": "attention", "case": "small", "batch": 2, "context": 128, "ours_us": 10, "fa3_us": 5},
]
PROFILE = [
    {
        "shape": "small",
        "num_rows": num_rows,
        "context": 7,
        "rows": [
            {"what": "products", "us": 10.0, "limit_us": 8.0},
            {"what": "others", "us": 1.0, "limit_us": None},
            {"what": "gaps", "us": 2.0},
            {"what": "step", "us": 12.0, "limit_us": 8.0},
        ],
    }
    for num_rows in (1, 2)
]


def write(results: Path, name: str, cases: list[dict[str, Any]]) -> None:
    file = results / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**ORIGIN, "cases": cases}))


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The pictures that come of a folder's results."""
    images = folder / "images"
    arguments = ["plot_results", "--results", str(folder), "--images", str(images)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plot_results.main() == 0
    return {file.stem for file in images.glob("*.png")}


def test_a_picture_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "throughput", THROUGHPUT)
    write(tmp_path, "latency", LATENCY)
    write(tmp_path, "profile_step", PROFILE)
    write(tmp_path, "kernels/decode_attention", [{**ATTENTION[0], "floor_us": 15.0}])
    assert run(tmp_path, monkeypatch) == set(PICTURES)


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "latency", LATENCY)
    assert run(tmp_path, monkeypatch) == {"latency"}
    lines = capsys.readouterr().out.splitlines()
    assert sum("left out" in line for line in lines) == len(PICTURES) - 1
    assert any(str(tmp_path / "throughput.json") in line for line in lines)


def test_bars_of_a_load_without_a_mark() -> None:
    (axes,) = draw_throughput(THROUGHPUT).axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {OURS: [90, 50], VLLM: [60]}


def test_lines_of_decode_attention_go_by_context() -> None:
    (axes,) = draw_decode_attention(ATTENTION).axes
    assert "batch 2" in axes.get_title()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn == {OURS: [[128, 10], [512, 20]], FA3: [[128, 5], [512, 40]]}


def test_shares_of_the_limit() -> None:
    cases = [
        {"op": "norm", "floor_us": 8.0, "ours_us": 10.0, "eager_us": 80.0},
        {"op": "norm", "floor_us": 9.0, "ours_us": 10.0},
        {"op": "prefill", "floor_us": 50.0, "us": 100.0},
    ]
    (axes,) = draw_kernel_limits(cases).axes
    dots = [line for line in axes.get_lines() if line.get_label() in COLOURS]
    drawn = [(line.get_label(), line.get_xdata().tolist()) for line in dots]
    assert drawn == [(OURS, [0.8, 0.9]), ("PyTorch eager", [0.1]), (OURS, [0.5])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["norm", "prefill"]


@pytest.mark.parametrize(
    ("picture", "case", "is_drawn"),
    [
        ("kernel_limits", {"floor_us": 8.0}, True),
        ("kernel_limits", {"floor_us": 0.1}, False),
        ("kernel_limits", {"case": "host", "host_us": 9.0}, False),
        ("decode_attention", {"fa3_us": 8.0}, True),
        ("decode_attention", {"fa3_us": None}, False),
        ("throughput", {"shape": "small"}, True),
    ],
)
def test_cases_that_a_picture_shows(picture: str, case: dict[str, Any], is_drawn: bool) -> None:
    assert PICTURES[picture].is_drawn(case) == is_drawn


def test_a_picture_of_no_such_case_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "kernels/decode_attention", [{**ATTENTION[0], "fa3_us": None, "floor_us": 9.0}])
    assert run(tmp_path, monkeypatch) == {"kernel_limits"}
