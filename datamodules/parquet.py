"""Images from parquet files in the schema of the Hugging Face hub: a struct with encoded bytes, and a label."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.datamodules.two_classes import TwoClasses, binary_labels, check_present, class_groups

__all__ = ["check_schema", "column_names", "decode", "read_parquet", "reading"]

_PICTURE_ERRORS = (  # what Pillow raises of damaged files
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error),
    Image.DecompressionBombError,
)


def decode(
    encoded: Sequence[bytes | None], file: Path, rows: Sequence[int], mode: str = "RGB", size: int = 32
) -> np.ndarray:
    """Decode square pictures.

    Args:
        encoded: n PNG or JPEG files.
        file: Where they are from, for errors.
        rows: Their n places in the file, counted from 0, for errors.
        mode: "RGB" or "L", which pictures of another kind are converted to.
        size: Height and width in pixels.

    Returns:
        uint8 images (n, size, size, 3) for "RGB" and (n, size, size) for "L".

    Raises:
        ValueError: A picture is missing, damaged or of another size.
    """
    images = np.empty((len(encoded), size, size, *((3,) if mode == "RGB" else ())), np.uint8)
    for image, picture, row in zip(images, encoded, rows, strict=True):
        try:
            with Image.open(io.BytesIO(picture or b"")) as opened:
                width, height = opened.size
                if width == height == size:
                    image[:] = np.asarray(opened.convert(mode))
        except _PICTURE_ERRORS as error:
            raise ValueError(
                f"{file}: the picture in row {row} cannot be read ({type(error).__name__}): get the file again, or "
                "take the row out."
            ) from error
        if not width == height == size:
            raise ValueError(
                f"{file}: the picture in row {row} has {width}x{height} pixels: resize it to {size}x{size}, or take "
                "the row out."
            )
    return images


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say what to do when the body cannot read a parquet file.

    Args:
        file: The file.

    Yields:
        Nothing.

    Raises:
        ValueError: The file is damaged.
    """
    import pyarrow as pa  # here and below: modules need no parquet, and import this package too

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} is not a whole parquet file ({reason}): download it again, or take it out."
        ) from error


def column_names(file: Path) -> set[str]:
    """Read the names of a parquet file's columns.

    Args:
        file: The file.

    Returns:
        The names.
    """
    import pyarrow.parquet as pq

    with reading(file):
        return set(pq.read_schema(file).names)


def check_schema(file: Path, image_column: str) -> None:
    """Check that a file has the schema of the hub.

    Args:
        file: Parquet file.
        image_column: Name of the column of images: structs with ``bytes``, an encoded picture.

    Raises:
        ValueError: A column is missing or of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(file):
        schema = pq.read_schema(file)
    missing = {image_column, "label"} - set(schema.names)
    if missing:
        raise ValueError(f"{file} lacks the column(s) {sorted(missing)}: it is not in the expected hub schema.")
    images, labels = schema.field(image_column).type, schema.field("label").type
    if not (pa.types.is_struct(images) and images.get_field_index("bytes") >= 0 and _is_binary(images.field("bytes"))):
        raise ValueError(
            f"{file}: the column {image_column} is {images} instead of struct<bytes: binary, ...>: store encoded "
            "pictures as the hub does."
        )
    if not pa.types.is_integer(labels):
        raise ValueError(f"{file}: the column label is {labels} instead of an integer: store class numbers.")


def read_parquet(
    files: Sequence[Path], image_column: str, classes: TwoClasses, mode: str = "RGB", size: int = 32
) -> Samples:
    """Read the images of two classes, or of two groups of classes.

    Args:
        files: Parquet files with the columns ``image_column`` (struct with ``bytes``, an encoded picture) and
            ``label``.
        image_column: Name of the column of images.
        classes: Class numbers for the labels -1 and +1, one or several for each.
        mode: "RGB" for images of three channels, "L" for one.
        size: Height and width of the pictures in pixels.

    Returns:
        uint8 images (n, C, size, size), labels (n,) and class numbers (n,), in the order of the files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, a column is missing or of another type, a picture cannot be read, no row has one
            of the classes, or a class of a group has no row.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = [number for group in class_groups(classes) for number in group]
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"No parquet file at {file}: check the path.")
        check_schema(file, image_column)
        with reading(file):
            every = pq.read_table(file, columns=["label"])["label"].to_numpy()
            chosen = pc.field("label").isin(wanted)
            table = pq.read_table(file, columns=[image_column, "label"], filters=chosen)
        pictures = pc.struct_field(table[image_column], "bytes").to_pylist()
        images.append(decode(pictures, file, np.flatnonzero(np.isin(every, wanted)).tolist(), mode, size))
        labels.append(table["label"].to_numpy())
    pixels = torch.from_numpy(np.concatenate(images))
    if not len(pixels):
        raise ValueError(f"No image of the classes {classes} in {[str(file) for file in files]}.")
    numbers = np.concatenate(labels)
    check_present(numbers, classes, ", ".join(map(str, files)))
    pixels = pixels.unsqueeze(1) if mode == "L" else pixels.movedim(-1, 1)
    return Samples(pixels.contiguous(), binary_labels(numbers, classes), torch.from_numpy(numbers))


def _is_binary(field: Any) -> bool:  # noqa: ANN401 - pyarrow ships no types
    import pyarrow as pa

    return bool(pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
