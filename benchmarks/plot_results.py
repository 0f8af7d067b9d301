"""Pictures of the results of the GPU benchmarks, for the guide.

Reads `throughput.json`, `latency.json`, `profile_step.json` and `kernels/*.json` of a folder of
results and writes a PNG for each kind; what is missing is named and left out. Needs matplotlib:
`pip install mini-infer[benchmarks]`.

    python benchmarks/plot_results.py
    python benchmarks/plot_results.py --results /tmp/results --images /tmp/images
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
OURS, VLLM, FA3 = "Mini-Infer", "vLLM 0.26", "FlashAttention-3"
COLOURS = {
    OURS: "#0072b2",
    VLLM: "#d55e00",
    FA3: "#009e73",
    "cuBLAS": "#e69f00",
    "torch.compile": "#cc79a7",
    "PyTorch eager": "#888888",
}
TIMES: Mapping[str, tuple[str, ...]] = {
    OURS: ("ours_us", "us"),
    FA3: ("fa3_us",),
    "cuBLAS": ("cublas_us",),
    "torch.compile": ("compiled_us",),
    "PyTorch eager": ("eager_us",),
}
"""Whose kernels were measured, and the names of their times."""
LEAST_LIMIT_US = 5.0
"""Cases with a shorter limit are left out of the shares: a launch takes as long."""
GAPS = "gaps"
DPI = 150
GRID = {"color": "lightgray", "linewidth": 0.6}

Case = dict[str, Any]


def main() -> int:
    """Draws what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the pictures")
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    for name, (pattern, draw, is_drawn) in PICTURES.items():
        contents = {
            file.stem: json.loads(file.read_text()) for file in options.results.glob(pattern)
        }
        named = (
            {"op": stem, **case} for stem in sorted(contents) for case in contents[stem]["cases"]
        )
        cases = [case for case in named if is_drawn(case)]
        if not cases:
            print(f"{name} is left out: there is nothing to draw in {options.results / pattern}")
            continue
        figure = draw(cases)
        add_legend(figure, origin_of(contents.values()))
        file = options.images / f"{name}.png"
        figure.savefig(file, dpi=DPI)
        print(file)
    return 0


def origin_of(contents: Iterable[Mapping[str, Any]]) -> str:
    """Where and when results came about."""
    origins = set()
    for content in contents:
        versions = ", ".join(f"{name} {each}" for name, each in content["versions"].items())
        origins.add(f"{content['gpu']}, {versions}, {content['date'][:10]}")
    return "\n".join(sorted(origins))


def draw_throughput(cases: list[Case]) -> Figure:
    """Output tokens a second of each load, beside vLLM's."""
    by_shape = grouped(cases, "shape")
    widths = [len(of_shape) for of_shape in by_shape.values()]
    figure, rows = panels([list(by_shape)], (2.5 + 0.95 * len(cases), 4.4), widths)
    for axes, of_shape in zip(rows[0], by_shape.values(), strict=True):
        loads = ("num_requests", "prompt_len", "output_len")
        shares = (case.get("share_of_vllm") for case in of_shape)
        draw_bars(
            axes,
            ["\n".join(str(case[each]) for each in loads) for case in of_shape],
            {
                OURS: [case["tokens_per_s"] for case in of_shape],
                VLLM: [case.get("vllm_tokens_per_s") for case in of_shape],
            },
            spreads=[(case["least"], case["most"]) for case in of_shape],
            notes=["" if share is None else f"{share:.2f} x" for share in shares],
        )
        axes.set_xlabel("requests\ntokens in\ntokens out", fontsize="small")
        axes.yaxis.set_major_formatter("{x:,.0f}")
    rows[0][0].set_ylabel("output tokens a second")
    figure.suptitle("Throughput, all requests at once; how many times vLLM's")
    return figure


def draw_latency(cases: list[Case]) -> Figure:
    """Times of one request at a time, beside vLLM's."""
    columns = {
        "each further token": ("ms_per_token", "vllm_ms_per_token", "least", "most"),
        "first token": ("ttft_ms", "vllm_ttft_ms", "ttft_least", "ttft_most"),
    }
    figure, rows = panels([list(columns)], (9.0, 3.9))
    for axes, (ours, vllm, least, most) in zip(rows[0], columns.values(), strict=True):
        draw_bars(
            axes,
            [case["shape"] for case in cases],
            {OURS: [case[ours] for case in cases], VLLM: [case.get(vllm) for case in cases]},
            spreads=[(case[least], case[most]) for case in cases],
            notes=[f"{case[ours]:.2f}" for case in cases],
        )
    rows[0][0].set_ylabel("milliseconds")
    figure.suptitle(f"One request at a time, {cases[0]['prompt_len']} tokens in; lower is better")
    return figure


def draw_decode_attention(cases: list[Case]) -> Figure:
    """Microseconds by context for each batch, beside FlashAttention-3's."""
    by_shape = grouped(cases, "case")
    by_batch = [grouped(of_shape, "batch") for of_shape in by_shape.values()]
    titles = [
        [f"{shape}, batch {batch}" for batch in sorted(batches)]
        for shape, batches in zip(by_shape, by_batch, strict=True)
    ]
    figure, rows = panels(titles, (3.0 * max(map(len, titles)), 1.2 + 2.4 * len(titles)))
    for row, batches in zip(rows, by_batch, strict=True):
        for axes, batch in zip(row, sorted(batches), strict=False):
            cells = sorted(batches[batch], key=lambda case: case["context"])
            contexts = [case["context"] for case in cells]
            for name in (FA3, OURS):
                (key, *_) = TIMES[name]
                times = [case[key] for case in cells]
                axes.plot(contexts, times, marker="o", color=COLOURS[name], label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize="small")
            axes.set_xlabel("tokens of context")
            axes.set_ylim(bottom=0)
        row[0].set_ylabel("microseconds")
    figure.suptitle("Decode attention of a layer; lower is better")
    return figure


def draw_kernel_limits(cases: list[Case]) -> Figure:
    """The share of the limit that each kernel reaches, a dot a case."""
    by_op = grouped(cases, "op")
    figure, rows = panels([["each dot is a case"]], (8.5, 2.0 + 0.6 * len(by_op)))
    axes = rows[0][0]
    for place, of_op in enumerate(by_op.values()):
        shares = {name: shares_of(of_op, name) for name in TIMES}
        names = [name for name in TIMES if shares[name]]
        for index, name in enumerate(names):
            height = place + 0.2 * (index - (len(names) - 1) / 2)
            heights = [height] * len(shares[name])
            axes.plot(shares[name], heights, "o", color=COLOURS[name], alpha=0.6, label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the limit: bytes at the rate of a copy, or arithmetic if it is more")
    name_rows(axes, [op.replace("_", " ") for op in by_op])
    figure.suptitle(f"Kernels, where the limit is {LEAST_LIMIT_US:.0f} µs or more")
    return figure


def draw_profile_step(cases: list[Case]) -> Figure:
    """Where the time of decoding steps goes, and the memory's limit for each part."""
    by_shape = list(grouped(cases, "shape").values())
    titles = [
        [
            f"{case['shape']}, batch {case['num_rows']}, {case['context']:,} tokens"
            for case in of_shape
        ]
        for of_shape in by_shape
    ]
    figure, rows = panels(titles, (4.4 * max(map(len, titles)), 1.2 + 2.6 * len(titles)))
    for row, of_shape in zip(rows, by_shape, strict=True):
        for axes, case in zip(row, of_shape, strict=False):
            *parts, step = case["rows"]
            colours = ["lightgray" if part["what"] == GAPS else COLOURS[OURS] for part in parts]
            axes.barh(range(len(parts)), [part["us"] for part in parts], color=colours)
            limits = [part.get("limit_us") for part in parts]
            places = [place for place, limit in enumerate(limits) if limit is not None]
            label = "limit of the memory"
            axes.plot([limits[place] for place in places], places, "|k", ms=13, mew=2, label=label)
            axes.set_xlabel(f"microseconds; the step: {step['us']:,.0f}")
            name_rows(axes, [part["what"] for part in parts])
    figure.suptitle("Kernels of a decoding step by batch and context")
    return figure


def has_fa3(case: Case) -> bool:
    """Whether a case of attention was measured with FlashAttention-3."""
    return case.get("fa3_us") is not None


def has_limit(case: Case) -> bool:
    """Whether a kernel's case is long enough to be held against its limit."""
    return case.get("floor_us", 0.0) >= LEAST_LIMIT_US


class Picture(NamedTuple):
    """Which results a picture shows, who draws them, and which cases."""

    pattern: str
    draw: Callable[[list[Case]], Figure]
    is_drawn: Callable[[Case], bool] = bool


PICTURES: Mapping[str, Picture] = {
    "throughput": Picture("throughput.json", draw_throughput),
    "latency": Picture("latency.json", draw_latency),
    "decode_attention": Picture("kernels/decode_attention.json", draw_decode_attention, has_fa3),
    "kernel_limits": Picture("kernels/*.json", draw_kernel_limits, has_limit),
    "profile_step": Picture("profile_step.json", draw_profile_step),
}


def grouped(cases: Iterable[Case], key: str) -> dict[Any, list[Case]]:
    """Cases by one of their fields, in the order in which its values come."""
    found: dict[Any, list[Case]] = {}
    for case in cases:
        found.setdefault(case[key], []).append(case)
    return found


def shares_of(cases: Iterable[Case], name: str) -> list[float]:
    """What somebody reaches of the limit, in the cases in which they were measured."""
    times = ((case["floor_us"], case.get(key)) for case in cases for key in TIMES[name])
    return [floor_us / time_us for floor_us, time_us in times if time_us is not None]


def panels(
    titles: Sequence[Sequence[str]],
    size: tuple[float, float],
    widths: Sequence[float] | None = None,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows of panels; rows that are shorter than the longest end with empty space.

    Args:
        titles: Of the panels.
        size: Inches, wide and high.
        widths: Of the columns, in relation to each other.
    """
    figure = Figure(figsize=size, layout="constrained")
    num_columns = max(map(len, titles))
    grid = figure.subplots(len(titles), num_columns, squeeze=False, width_ratios=widths)
    rows = [list(row) for row in grid]
    for row, of_row in zip(rows, titles, strict=True):
        for axes, title in zip(row, of_row, strict=False):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", **GRID)
            axes.set_axisbelow(True)
            axes.set_title(title, fontsize="medium")
        for axes in row[len(of_row) :]:
            axes.set_visible(False)
    return figure, rows


def draw_bars(
    axes: Axes,
    labels: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    *,
    spreads: Sequence[tuple[float, float]],
    notes: Sequence[str],
) -> None:
    """Bars side by side for each label.

    Args:
        axes: Where.
        labels: Below the bars.
        values: Of each engine; those of None are left out.
        spreads: The least and the most of the first engine's values.
        notes: Above its bars.
    """
    width = 0.8 / len(values)
    for index, (name, of_name) in enumerate(values.items()):
        bars = [(place + index * width, each) for place, each in enumerate(of_name) if each]
        places, heights = zip(*bars, strict=True) if bars else ((), ())
        axes.bar(places, heights, width, color=COLOURS[name], label=name)
    for place, ((least, most), note) in enumerate(zip(spreads, notes, strict=True)):
        axes.vlines(place, least, most, color="black", linewidth=1)
        axes.annotate(
            note, (place, most), (0, 2), textcoords="offset points", ha="center", fontsize="x-small"
        )
    middle = width * (len(values) - 1) / 2
    axes.set_xticks([place + middle for place in range(len(labels))], labels, fontsize="small")


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Writes names beside rows, the first one at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", **GRID)


def add_legend(figure: Figure, origin: str) -> None:
    """One legend for all panels, each label once, and where the figures come from."""
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=len(labelled),
        frameon=False,
        fontsize="small",
        title=origin,
        title_fontsize="x-small",
    )


if __name__ == "__main__":
    sys.exit(main())
