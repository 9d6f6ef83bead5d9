"""Studies read from YAML, or from what their tables say of them, by one parser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ntk_lightning.shipped_configs import find_config
from ntk_lightning.studies.config import StudyConfig

__all__ = ["parse_config", "read_config"]


def read_config(files: Sequence[str | Path], scale: str | None = None) -> StudyConfig:
    """Read a study from YAML.

    Args:
        files: Later files change earlier ones, key by key at any depth; the value null removes a key, so that
            ``published: null`` clears what an earlier file lists. A file that is not there is looked for among those
            that come with the package, such as ``cli_configs/studies/figure_1a.yaml``. Their key ``base`` names a file
            that they change: one beside them, or else one that would be found here. A file that takes another class of
            data drops the exponents that the paper published of its own, and the name of its scale. The key ``scales``
            holds, by name, further changes.
        scale: Which of those to make, in every file that has it; None for none.

    Returns:
        The study.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no YAML, a key or value is wrong, or there is no such scale.
    """
    raw: dict[str, Any] = {}
    names: set[str] = set()
    for file in files:
        content = _read_yaml(Path(find_config(str(file))))
        scales = content.pop("scales", {})
        if not isinstance(scales, dict) or not all(isinstance(change, dict) for change in scales.values()):
            raise ValueError(f"scales in {file} must map names to changes, such as scales: {{small: {{grid: ...}}}}.")
        names.update(scales)
        raw = _merge(_change(raw, content), scales.get(scale, {}))
    if scale is not None:
        if scale not in names:
            raise ValueError(f"There is no scale {scale!r} in {[str(file) for file in files]}, only {sorted(names)}.")
        raw["scale"] = scale
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, files))}: {error}") from error


def parse_config(raw: dict[str, Any]) -> StudyConfig:
    """Check the keys and values of a study, and fill in the defaults.

    Args:
        raw: What a YAML file or the metadata of a result table holds.

    Returns:
        The study.

    Raises:
        ValueError: A key or value is wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyConfig, as_group=False)
    try:
        return StudyConfig(**vars(parser.instantiate_classes(parser.parse_object(raw))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from error


def _read_yaml(file: Path, changed_by: Path | None = None) -> dict[str, Any]:
    if not file.is_file():
        what = f"the base of {changed_by}: name a file beside it" if changed_by else "name one of your own"
        raise FileNotFoundError(
            f"No study configuration at {file}, {what}, or one that comes with the package, such as "
            "cli_configs/studies/figure_1a.yaml."
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a mapping of study settings: see cli_configs/studies.")
    base = content.pop("base", None)
    if base is None:
        return content
    beside = file.parent / str(base)
    found = beside if beside.is_file() else Path(find_config(str(base)))
    return _change(_read_yaml(found if found.is_file() else beside, file), content)


def _change(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Change a study by a file; what the paper says of its own data is not kept for others."""
    classes = [made.get("class_path") for made in (base.get("data"), content.get("data")) if isinstance(made, dict)]
    if None not in classes and len({*classes}) == 2:
        base = {key: value for key, value in base.items() if key != "scale"}
        if isinstance(base.get("figure"), dict):
            base["figure"] = {key: value for key, value in base["figure"].items() if key != "published"}
    return _merge(base, content)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Change some keys, at any depth; null removes one, a new ``class_path`` takes none of the old one's arguments."""
    if change.get("class_path", base.get("class_path")) != base.get("class_path"):
        base = {}
    merged = dict(base)
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            old = merged.get(key)
            merged[key] = _merge(old if isinstance(old, dict) else {}, value)
        else:
            merged[key] = value
    return merged
