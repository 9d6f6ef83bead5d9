"""What a study's figure says in words: what is drawn, on how many seeds, what was left out, what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ntk_lightning.studies.figure import StudyFigure
from ntk_lightning.studies.figure_text import interval_text, number_text
from ntk_lightning.studies.results import StudyResults

__all__ = ["figure_caption"]


def figure_caption(figure: StudyFigure) -> str:
    """Write the caption of a figure; mathematics stands between dollar signs.

    Args:
        figure: A figure of a study.

    Returns:
        The study's own caption, then sentences on data, network and optimizer, on seeds, bars, fits, published
        exponents and everything left out.
    """
    study, quantity, config = figure.study, figure.quantity, figure.study.config
    sentences = [config.figure.caption.strip(), _setting_sentence(study)]
    if config.scale:
        sentences.append(f"Configured scale: {config.scale}.")
    fits = "That of a network is its own at step $t$; every other" if study.axis == "t" else "Each"
    stopped = (
        "that of the fit's last step"
        if study.value == "last"
        else "the lowest over the fit (optimal early stopping, an oracle)"
    )
    sentences.append(f"{fits} test {quantity} is {stopped}.")
    sentences.append(_spread_sentence(figure))
    sentences.append(_test_images_sentence(figure))
    if figure.exponents:
        of = f"test {quantity} ∝ ${study.axis}^{{-β}}$"
        sentences.append(f"Dotted: fits of {of}, with 95% intervals (of the seeds; with one seed, of the residuals).")
        sentences.append(_differences_sentence(figure))
        sentences.append(_prediction_sentence(figure))
    if config.figure.published and quantity == "error":
        values = "; ".join(f"{name} {beta:g}" for name, beta in config.figure.published.items())
        sentences.append(f"Exponents that the paper (arXiv 2206.10012) prints of its own data and networks: {values}.")
    if config.scale:  # one of the paper's studies
        sentences.append(
            "Learning rates, momentum, batch sizes and numbers of samples are choices of this study, not known to be "
            "the paper's."
        )
    sentences += [f"{str(departure)[0].upper()}{str(departure)[1:]}" for departure in figure.departures]
    sentences += [f"{'; '.join(labels)}: {note}" for note, labels in figure.notes.items()]
    return " ".join(sentence for sentence in [*sentences, *_left_out(figure)] if sentence)


def _setting_sentence(study: StudyResults) -> str:
    """Say on what data, with which networks and by which optimizers the rows were made."""
    config, rows = study.config, study.rows
    parts = [
        _class_text(config.data, ("path", "n_statistics", "eval_batch_size")),
        _class_text(config.net, ("in_channels",)),
    ]
    texts = {column: _list_text(row[column] for row in rows) for column in ("n", "width", "lr", "momentum", "epochs")}
    batches = _list_text(row["batch_size"] for row in rows if not row["full_batch"])
    steps = [f"batches of {batches}"] * bool(batches) + ["full batch"] * any(row["full_batch"] for row in rows)
    stops = any(arm.until_train_error is not None for arm in config.arms)
    parts += [
        f"$n$ = {texts['n']}" if study.axis in ("t", "width") else "",
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


def _spread_sentence(figure: StudyFigure) -> str:
    """Say over how many seeds the means are, and what their bars show."""
    counts = {line.at(x).size for line in figure.lines for x in [*line.xs, None]} - {0}
    kinds = {
        "none (one seed)": {c for c in counts if c == 1},
        "the range of 2 seeds": {c for c in counts if c == 2},
        "the standard error of the mean": {c for c in counts if c > 2},
    }
    low, high = min(counts), max(counts)
    seeds = f"{low}" if low == high else f"{low} to {high}"
    bars = "; ".join(kind for kind, found in kinds.items() if found)
    if figure.test_images:
        bars += f", with the binomial error of {figure.test_images} test images added in squares"
    return f"Means over {seeds} seed{'s' * (high > 1)}; bars or bands: {bars}."


def _test_images_sentence(figure: StudyFigure) -> str:
    """Say how many test images an error counts, where the study's configuration tells their number."""
    count = figure.test_images
    if count is None:
        return ""
    least = min(float(line.at(x).min()) for line in figure.lines for x in [*line.xs, None] if line.at(x).size)
    return (
        f"All seeds share the {count} test images, whose choice no exponent's interval covers; the least error of a "
        f"seed, {100 * least:.2g}%, is {round(least * count)} of them."
    )


def _differences_sentence(figure: StudyFigure) -> str:
    """Name the differences of the exponents, with p-values corrected for their number."""
    tested = [(e.label, e.comparison) for e in figure.exponents if e.comparison is not None]
    if not tested:
        return ""
    texts = [
        f"{label} {number_text(test.difference.difference, 3)} {interval_text(test.difference.interval)}, "
        f"p = {test.corrected_p_value:.2g}"
        for label, test in tested
    ]
    corrected = f", p-values corrected for {len(tested)} claims (Holm, 1979)" if len(tested) > 1 else ""
    return f"Exponent of {figure.exponents[0].label} less that of: {'; '.join(texts)}{corrected}."


def _prediction_sentence(figure: StudyFigure) -> str:
    """Say what the thin lines are, and how far they are off."""
    predicted = [(e.label, e.predicted) for e in figure.exponents if e.predicted is not None]
    if not predicted:
        return ""
    offs = [f"{label} {100 * p.deviation:+.0f}% at {p.at}" for label, p in predicted if p.at is not None]
    return (
        "Thin: ridge regression at the best ridge, as predicted from the spectrum of each kernel and the labels (Simon "
        "et al., 2021, arXiv 2110.03922), from the Gram of a line's largest $n$, or where the kernel is another at "
        f"each $n$, of its own; furthest from the measured: {'; '.join(offs)}."
    )


def _left_out(figure: StudyFigure) -> list[str]:
    """Say which fits have no value, and which diverged although they have one."""
    sentences, quantity = [], figure.quantity
    if figure.left_out:
        which = "; ".join(
            f"{name} at {', '.join(at[:4])}{' …' * (len(at) > 4)}" for name, at in figure.left_out.items()
        )
        count = sum(map(len, figure.left_out.values()))
        sentences.append(f"Left out, because their test {quantity} is missing or not finite ({count}): {which}.")
    diverged = [
        row
        for row in figure.study.rows
        if quantity == "error" and row["last_loss"] is not None and not math.isfinite(row["last_loss"])
    ]
    if diverged:
        arms = ", ".join(sorted({row["arm"] for row in diverged}))
        shown = "last" if figure.study.value == "last" else "best"
        sentences.append(
            f"Fits whose last test loss is not finite ({len(diverged)}; their {shown} error is shown): {arms}."
        )
    return sentences
