"""What a study's figure says in words: what is drawn, on how many seeds, what was left out, what the paper reports."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

from ntk_lightning.studies.figure_departure import timed_pairs
from ntk_lightning.studies.figure_fits import exponents
from ntk_lightning.studies.figure_lines import study_series
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["html_text", "interval_text", "number_text", "plain_text", "study_caption"]


def study_caption(results: StudyResults, quantity: Quantity = "error") -> str:
    """Write the caption of a study's figure; mathematics stands between dollar signs.

    Args:
        results: A study.
        quantity: Test error or test loss.

    Returns:
        The study's own caption, then sentences on data, network and optimizer, on seeds, bars, fits, published
        exponents and everything left out.
    """
    figure, lines = results.config["figure"], study_series(results, quantity)
    sentences = [str(figure.get("caption") or "").strip(), _setting_sentence(results)]
    if results.config.get("scale"):
        sentences.append(f"Configured scale: {results.config['scale']}.")
    fits = "That of a network is its own at step $t$; every other" if results.axis == "t" else "Each"
    stopped = (
        "that of the fit's last step"
        if results.value == "last"
        else "the lowest over the fit (optimal early stopping, an oracle)"
    )
    sentences.append(f"{fits} test {quantity} is {stopped}.")
    sentences.append(
        _spread_sentence({len(line.at(x)) for line in lines for x in [*line.places, None] if line.at(x).size})
    )
    rows = exponents(results, quantity)
    if rows:
        of = f"test {quantity} ∝ ${results.axis}^{{-β}}$"
        sentences.append(f"Dotted: fits of {of}, with 95% intervals (of the seeds; with one seed, of the residuals).")
    published = figure.get("published") or {}
    if published and quantity == "error":
        values = "; ".join(f"{name} {beta:g}" for name, beta in published.items())
        sentences.append(f"Exponents that the paper (arXiv 2206.10012) prints: {values}.")
    sentences.append(
        "Learning rates, momentum, batch sizes and numbers of samples are choices of this study, not known to be the "
        "paper's."
    )
    sentences += [f"{str(pair)[0].upper()}{str(pair)[1:]}" for pair in timed_pairs(results, quantity)]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            notes.setdefault(note, []).append(row["series"])
    sentences += [f"{'; '.join(names)}: {note}" for note, names in notes.items()]
    return " ".join(sentence for sentence in [*sentences, *_left_out(results, quantity)] if sentence)


def plain_text(text: str) -> str:
    """Write a label without markup: "$K^F_{16k}(n)$" becomes "K^F_16k(n)".

    Returns:
        The text.
    """
    return re.sub(r"\$([^$]*)\$", lambda match: re.sub(r"[{}\\]", "", match[1]), text)


def html_text(text: str) -> str:
    """Write a label as HTML, with indices as such and everything else escaped.

    Returns:
        HTML.

    Example:
        >>> html_text("$K_{16k}(n)$ < 1")
        '<i>K<sub>16k</sub>(n)</i> &lt; 1'
    """

    def mathematics(match: re.Match[str]) -> str:
        inner = match[1]
        for sign, tag in (("_", "sub"), (r"\^", "sup")):
            inner = re.sub(sign + r"(?:{([^}]*)}|(.))", rf"<{tag}>\1\2</{tag}>", inner)
        return f"<i>{inner}</i>"

    return re.sub(r"\$([^$]*)\$", mathematics, html.escape(text))


def interval_text(interval: tuple[float, float]) -> str:
    """Write a confidence interval.

    Returns:
        Text such as "[0.25, 0.33]".
    """
    if not all(map(math.isfinite, interval)):
        return "[no interval]"
    return f"[{number_text(interval[0], 2)}, {number_text(interval[1], 2)}]"


def number_text(value: float, digits: int) -> str:
    """Write a number with so many digits behind the point, and 0 without a sign.

    Returns:
        The text.

    Example:
        >>> number_text(-0.0001, 2)
        '0.00'
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _setting_sentence(results: StudyResults) -> str:
    """Say on what data, with which networks and by which optimizers the rows were made."""
    config, rows = results.config, results.rows
    data, net = (config.get(key) or {} for key in ("data", "net"))
    parts = [_class_text(data, ("path", "n_statistics", "eval_batch_size")), _class_text(net, ("in_channels",))]
    texts = {column: _list_text(row[column] for row in rows) for column in ("n", "width", "lr", "momentum", "epochs")}
    batches = _list_text(row["batch_size"] for row in rows if not row["full_batch"])
    steps = [f"batches of {batches}"] * bool(batches) + ["full batch"] * any(row["full_batch"] for row in rows)
    stops = any(arm.get("until_train_error") is not None for arm in config.get("arms", []))
    parts += [
        f"$n$ = {texts['n']}" if results.axis in ("t", "width") else "",
        f"width {texts['width']}" if texts["width"] else "",
        f"learning rate {texts['lr']}",
        f"momentum {texts['momentum']}",
        " or ".join(steps),
        f"{'at most ' * stops}{texts['epochs']} epochs",
    ]
    text = ", ".join(filter(None, parts))
    return f"{text[0].upper()}{text[1:]}."


def _class_text(made: dict[str, Any], hidden: tuple[str, ...]) -> str:
    """The class of a configuration with its arguments: "MyrtleCNN (depth 5)"."""
    name = str(made.get("class_path") or "").rpartition(".")[2]
    arguments = {key: value for key, value in (made.get("init_args") or {}).items() if key not in hidden}
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in arguments.items())
    return f"{name} ({told})" if name and told else name


def _list_text(values: Iterable[float | None]) -> str:
    """The different values, ascending."""
    return ", ".join(f"{value:g}" for value in sorted({value for value in values if value is not None}))


def _spread_sentence(counts: set[int]) -> str:
    kinds = {
        "none (one seed)": {c for c in counts if c == 1},
        "the range of 2 seeds": {c for c in counts if c == 2},
        "the standard error of the mean": {c for c in counts if c > 2},
    }
    low, high = min(counts), max(counts)
    seeds = f"{low}" if low == high else f"{low} to {high}"
    bars = "; ".join(kind for kind, found in kinds.items() if found)
    return f"Means over {seeds} seed{'s' * (high > 1)}; bars or bands: {bars}."


def _left_out(results: StudyResults, quantity: Quantity) -> list[str]:
    """Say which fits have no value, and which diverged although they have one."""
    sentences = []
    empty: dict[str, list[str]] = {}
    for line in study_series(results, quantity, keep_empty=True):
        if line.left_out:
            empty[line.label] = line.left_out
    if empty:
        which = "; ".join(
            f"{name} at {', '.join(places[:4])}{' …' * (len(places) > 4)}" for name, places in empty.items()
        )
        count = sum(map(len, empty.values()))
        sentences.append(f"Left out, because their test {quantity} is missing or not finite ({count}): {which}.")
    diverged = [
        row
        for row in results.rows
        if quantity == "error" and row["last_loss"] is not None and not math.isfinite(row["last_loss"])
    ]
    if diverged:
        arms = ", ".join(sorted({row["arm"] for row in diverged}))
        shown = "last" if results.value == "last" else "best"
        sentences.append(
            f"Fits whose last test loss is not finite ({len(diverged)}; their {shown} error is shown): {arms}."
        )
    return sentences
