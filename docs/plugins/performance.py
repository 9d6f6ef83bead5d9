"""The performance page's tables and pictures, made of nothing but ``benchmarks/results/*.json``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OURS, OTHERS = "#1b6ca8", "#b0b7c3"
MACHINE = ("cpu", "cores", "python", "torch", "numpy")
NOT_MEASURED = "not measured"


def read(name: str) -> dict[str, Any]:
    """Read what a benchmark has printed.

    Returns:
        The content of ``benchmarks/results/<name>.json``.
    """
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def tables() -> dict[str, str]:
    """Write every table of the page in Markdown.

    Returns:
        The tables by the names that the page asks for.
    """
    infinite, empirical, others = read("infinite_ntk_cpu"), read("empirical_ntk_cpu"), read("other_libraries_cpu")
    sources = ("infinite_ntk_cpu", "empirical_ntk_cpu", "other_libraries_cpu", "import_time")
    return {
        "machines": _table(
            ["results", "processor", "cores", "Python", "PyTorch", "NumPy"],
            [
                [f"`{name}.json`", *(str(read(name)["machine"][key]) for key in MACHINE)]
                for name in sources
                if (RESULTS / f"{name}.json").exists()
            ],
        ),
        "infinite": _table(
            ["network", "pairs/s", "neural-tangents, pairs/s", "ratio", "ratio per core"],
            [
                [
                    row["network"],
                    f"{row['pairs_per_s']:.0f}",
                    _number(row, "neural_tangents_pairs_per_s", ".2f"),
                    _number(row, "ratio", ".0f"),
                    _number(row, "ratio_per_core", ".0f"),
                ]
                for row in infinite["speed"]
            ],
        ),
        "accuracy": _table(
            ["network", "images", "largest relative error of an entry"],
            [
                [row["network"], images, f"{value:.1e}"]
                for row in infinite["accuracy"]
                for images, value in row.items()
                if images != "network"
            ],
        ),
        "scaling": _table(
            ["what grows", "from", "to", "cost grows with the power"],
            [
                [what, str(before[key]), str(after[key]), f"{after['power']:.2f}"]
                for what, key in (("images", "n"), ("side of an image", "side"))
                for before, after in zip(infinite["scaling"][key], infinite["scaling"][key][1:], strict=False)
            ],
        ),
        "empirical": _table(
            ["what computes it", "best of the rounds, seconds", "times ours"],
            [[name, f"{seconds:.3f}", f"{seconds / ours:.2f}"] for name, seconds, ours in _empirical(empirical)],
        ),
        "libraries": _table(
            ["what", "library", "ours, s", "theirs, s", "theirs over ours", "largest difference"],
            [
                [
                    f"{what}, n = {others['n']}",
                    f"{library} {others['versions'][package]}",
                    *(f"{min(times):.3f}" for times in others[part]["seconds"].values()),
                    f"{others[part]['ratio']:.2f}",
                    f"{others[part]['difference']:.1e}",
                ]
                for part, what, library, package in (
                    ("gram", "Gram", "nngeometry", "nngeometry"),
                    ("product", "product with a vector", "curvlinops", "curvlinops-for-pytorch"),
                )
            ],
        ),
        "taylor": _table(
            ["model", "best of the rounds, seconds a step", "times the network"],
            [[name, f"{seconds:.4f}", f"{seconds / base:.2f}"] for name, seconds, base in _taylor(empirical)],
        ),
        "seeds": _table(
            ["network", "single runs over one stacked", "largest difference over how far weights moved"],
            [
                [name, f"{row['single_over_stacked']:.2f}", f"{row['difference_over_movement']:.0e}"]
                for name, row in read("stacked_seeds")["networks"].items()
            ],
        ),
        "gpu": _gpu(),
        "imports": _imports(),
        "rest": _table(
            ["what", "measured"],
            [
                ["kernel SGD, times reading the Gram once an epoch (medians)", _fixed(empirical, "kernel_sgd")],
                [
                    "`FiniteNetwork` under the Trainer, samples/s over those of a bare loop",
                    f"{empirical['trainer']['samples_per_second_of_bare_loop']:.3f}",
                ],
                [
                    f"`EmpiricalNTKDynamics` at 30 log-spaced of {empirical['dynamics']['steps']} steps, times the run "
                    "without",
                    f"{empirical['dynamics']['watched_over_unwatched']:.2f}",
                ],
                *(
                    [
                        f"empirical NTK within {budget}: peak memory, seconds",
                        f"{part['peak_bytes'] / 1e6:.0f} MB, {part['seconds']:.1f} s",
                    ]
                    for budget, part in empirical["memory"].items()
                    if isinstance(part, dict)
                ),
                ["peak memory of a Gram of 2000 16x16 images", f"{infinite['peak_mib_n2000_16x16']:.0f} MiB"],
            ],
        ),
    }


def pictures() -> dict[str, str]:
    """Draw the pictures of the page.

    Returns:
        SVG by name.
    """
    infinite, empirical = read("infinite_ntk_cpu"), read("empirical_ntk_cpu")
    keys = {"neural-tangents": "neural_tangents_pairs_per_s", "ours": "pairs_per_s"}
    speed = [
        (f"{row['network']}, {name}", row[key]) for row in infinite["speed"] for name, key in keys.items() if key in row
    ]
    names, values = [name for name, _ in speed], [value for _, value in speed]
    first = _bars(names[::-1], values[::-1], "pairs of 32x32 images a second", log=True)
    rows = [(name, seconds) for name, seconds, _ in _empirical(empirical)]
    second = _bars(
        [name for name, _ in rows][::-1], [seconds for _, seconds in rows][::-1], "seconds (best of the rounds)"
    )
    return {"infinite": _svg(first), "empirical": _svg(second)}


def _gpu() -> str:
    """Table of every GPU that has results."""
    reports = [report for file in sorted(RESULTS.glob("*.json")) if "gpu" in (report := json.loads(file.read_text()))]
    rows = [
        [
            report["gpu"],
            name.replace("myrtle", "Myrtle-"),
            f"{part['pairs_per_second']:.0f}",
            f"{part['fraction_of_fp32_peak']:.1%}",
            f"{part['max_relative_error_of_6_images']:.1e}",
        ]
        for report in reports
        for name, part in report.items()
        if isinstance(part, dict) and "pairs_per_second" in part
    ]
    if not rows:
        return "`benchmarks/results/` has no results of a GPU yet."
    return _table(["GPU", "network", "pairs/s", "of the fp32 peak", "largest relative error, 6 images"], rows)


def _imports() -> str:
    """Table of what importing the package costs."""
    if not (RESULTS / "import_time.json").exists():
        return f"`benchmarks/results/import_time.json` is not there yet: {NOT_MEASURED}."
    times = read("import_time")
    rows = [
        [
            f"`{statement}`",
            *(f"{times['median_seconds'][clock][name]:.2f}" for clock in ("wall", "processor")),
            f"{ratio['processor']:.3f} times {ratio['peer']}" if (ratio := times["ratios"].get(name)) else "",
        ]
        for name, statement in times["statements"].items()
    ]
    return _table(["statement", "seconds", "processor seconds", "processor seconds beside Lightning's"], rows)


def _number(row: dict[str, Any], key: str, form: str) -> str:
    """A number of the results, of a peer that may not have been there."""
    return format(row[key], form) if key in row else NOT_MEASURED


def _empirical(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    seconds = {name: min(values) for name, values in results["speed"]["seconds"].items()}
    return [(name, value, seconds["EmpiricalNTK"]) for name, value in seconds.items()]


def _taylor(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    seconds = {name: min(values) for name, values in results["taylor"]["seconds"].items()}
    return [(name, value, seconds["finite network"]) for name, value in seconds.items()]


def _fixed(results: dict[str, Any], part: str) -> str:
    return f"{results[part]['ratio_to_reading_once_an_epoch']['medians']:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bars(names: list[str], values: list[float], label: str, *, log: bool = False) -> Figure:
    figure = Figure(figsize=(7.2, 0.7 + 0.42 * len(names)), layout="constrained")
    axes: Axes = figure.subplots()
    colors = [OURS if name.endswith("ours") or name == "EmpiricalNTK" else OTHERS for name in names]
    bars = axes.barh(names, values, color=colors, height=0.68)
    axes.bar_label(bars, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values], padding=4)
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=1)
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "ntk_lightning"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
