"""A task whose labels come from a random network."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.networks import FiveLayerCNN
from ntk_lightning.whole_number import check_size

__all__ = ["SyntheticTeacher"]


class SyntheticTeacher(ImageDataModule):
    """Random images labelled by the sign of a random teacher network in NTK parameterization.

    The design is this project's choice. The label is sign(f(x) - m) with m the median of the teacher's outputs on the
    training pool, so that both classes are equally frequent.

    Args:
        distribution: "gaussian" for pixels from N(0, 1), "sphere" for the same scaled to norm sqrt(C * H * W).
        shape: Channels, height and width of an image.
        teacher: The teacher, of which a copy is used as it is, with one output; by default a
            :class:`~ntk_lightning.networks.FiveLayerCNN` of width 64 with weights drawn from ``teacher_seed``.
        teacher_seed: Seed of the images and of the default teacher.
        pool_size: Images in the training pool and in the test pool.
        **kwargs: Those of :class:`~ntk_lightning.datamodules.ImageDataModule`.

    Raises:
        ValueError: ``distribution`` is unknown, the pool is empty, the images are too small for the default teacher, or
            the teacher does not map them to one output.
    """

    def __init__(
        self,
        distribution: Literal["gaussian", "sphere"] = "gaussian",
        shape: tuple[int, int, int] = (3, 32, 32),
        teacher: nn.Module | None = None,
        teacher_seed: int = 0,
        pool_size: int = 4096,
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> None:
        super().__init__(**kwargs)
        if distribution not in ("gaussian", "sphere"):
            raise ValueError(f'distribution must be "gaussian" or "sphere", got {distribution!r}.')
        self.distribution, self.shape, self.teacher_seed, self.pool_size = distribution, shape, teacher_seed, pool_size
        check_size("pool_size", pool_size, 1)
        if teacher is None:
            if len(shape) != 3 or min(shape[1:]) < 8:
                raise ValueError(f"The default teacher needs shape (C, H, W) of at least 8x8 pixels, got {shape}.")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(teacher_seed)
                teacher = FiveLayerCNN(width=64, in_channels=shape[0])
        self._median: torch.Tensor | None = None
        self.teacher = deepcopy(teacher).requires_grad_(False).eval()
        try:
            outputs = self._outputs(torch.zeros(2, *shape))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"The teacher does not take float32 images (n, {', '.join(map(str, shape))}) on the CPU ({reason}): "
                "change it, or shape."
            ) from error
        if outputs.numel() != 2:
            raise ValueError(
                f"The teacher must have one output an image, got {tuple(outputs.shape)} of 2 images: end it in a layer "
                "with one output."
            )

    def load(self, train: bool) -> Samples:
        """Draw the images and label them (see the base class)."""
        images, outputs = self._draw(train)
        if train:
            self._median = outputs.median()
        elif self._median is None:
            self._median = self._draw(train=True)[1].median()
        return Samples(images, torch.where(outputs > self._median, 1.0, -1.0))

    def _draw(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(np.random.SeedSequence((self.teacher_seed, int(train))))
        images = torch.from_numpy(rng.standard_normal((self.pool_size, *self.shape), dtype=np.float32))
        if self.distribution == "sphere":
            images *= images[0].numel() ** 0.5 / images.flatten(1).norm(dim=1)[:, None, None, None]
        return images, torch.cat([self._outputs(chunk) for chunk in torch.split(images, 256)]).flatten()

    def _outputs(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            outputs: torch.Tensor = self.teacher(images)
        return outputs
