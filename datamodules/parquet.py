"""Images from parquet files in the schema of the Hugging Face hub: a struct with encoded bytes, and a label."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ntk_lightning.datamodules.base import Samples

__all__ = ["binary_labels", "column_names", "decode", "read_parquet"]


def binary_labels(labels: np.ndarray, classes: tuple[int, int]) -> torch.Tensor:
    """Map the first class to -1 and the second to +1.

    Args:
        labels: (n,) class numbers, each one of the two.
        classes: The two class numbers.

    Returns:
        float32 labels (n,).
    """
    return torch.from_numpy(np.where(labels == classes[1], 1.0, -1.0).astype(np.float32))


def decode(encoded: Sequence[bytes]) -> np.ndarray:
    """Decode pictures of equal size.

    Args:
        encoded: n PNG or JPEG files.

    Returns:
        uint8 images (n, H, W) or (n, H, W, C).
    """
    return np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in encoded])


def column_names(file: Path) -> set[str]:
    """Read the names of a parquet file's columns.

    Args:
        file: The file.

    Returns:
        The names.

    Raises:
        ValueError: The file is damaged.
    """
    import pyarrow as pa  # here and below: modules need no parquet, and import this package too
    import pyarrow.parquet as pq

    try:
        return set(pq.read_schema(file).names)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a whole parquet file: download it again, or take it out.") from error


def read_parquet(files: Sequence[Path], image_column: str, classes: tuple[int, int]) -> Samples:
    """Read the images of two classes.

    Args:
        files: Parquet files with the columns ``image_column`` (struct with ``bytes``, an encoded picture) and
            ``label``.
        image_column: Name of the column of images.
        classes: Class numbers for the labels -1 and +1.

    Returns:
        uint8 images (n, C, H, W) and labels (n,), in the order of the files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A column is missing, or no row has one of the two classes.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    pictures: list[bytes] = []
    labels: list[np.ndarray] = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"No parquet file at {file}: check the path.")
        missing = {image_column, "label"} - column_names(file)
        if missing:
            raise ValueError(f"{file} lacks the column(s) {sorted(missing)}: it is not in the expected hub schema.")
        table = pq.read_table(file, columns=[image_column, "label"], filters=pc.field("label").isin(list(classes)))
        pictures += pc.struct_field(table[image_column], "bytes").to_pylist()
        labels.append(table["label"].to_numpy())
    if not pictures:
        raise ValueError(f"No image of the classes {classes} in {[str(file) for file in files]}.")
    images = torch.from_numpy(decode(pictures))
    images = images.unsqueeze(1) if images.dim() == 3 else images.movedim(-1, 1)
    return Samples(images.contiguous(), binary_labels(np.concatenate(labels), classes))
