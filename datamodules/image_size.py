"""Smaller images: averages over square patches of pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["average_pool", "check_image_size"]

_CHUNK = 1024  # images that are in float64 at a time


def check_image_size(image_size: int | None, shape: tuple[int, ...]) -> None:
    """Check that images can be averaged down to a size.

    Args:
        image_size: Height and width that are asked for; None asks for none.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: The images are not square, or their side is no multiple of ``image_size``.
    """
    if image_size is None:
        return
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"image_size = {image_size} needs square images (C, H, W), got samples of shape {shape}: leave image_size "
            "out, or crop or pad the images to squares."
        )
    side = shape[1]
    if side % image_size:
        divisors = ", ".join(str(size) for size in range(1, side + 1) if side % size == 0)
        raise ValueError(
            f"image_size = {image_size} does not divide the images' side of {side} pixels: give one of {divisors}."
        )


def average_pool(x: Tensor, image_size: int | None) -> Tensor:
    """Average images over squares of pixels: x'[i, j] = mean of x over the k x k pixels of square (i, j), k = H / H'.

    Args:
        x: Images (n, C, H, H) of any real dtype.
        image_size: H', a divisor of H; None leaves the images as they are.

    Returns:
        Images (n, C, H', H'), averaged in float64 and rounded to float32; float64 for float64 images.

    Raises:
        ValueError: H' does not divide H.

    Example:
        >>> average_pool(torch.tensor([[[[0, 1], [2, 4]]]], dtype=torch.uint8), 1)
        tensor([[[[1.7500]]]])
    """
    if image_size is None:
        return x
    check_image_size(image_size, tuple(x.shape[1:]))
    window = x.shape[-1] // image_size
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(*x.shape[:2], image_size, image_size, dtype=dtype)
    for images, pooled in zip(x.split(_CHUNK), out.split(_CHUNK), strict=True):
        pooled.copy_(F.avg_pool2d(images.double(), window))
    return out
