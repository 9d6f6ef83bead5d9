"""The user's own tensors as a data module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.whole_number import check_size

__all__ = ["TensorData"]


class TensorData(ImageDataModule):
    """Two classes given as tensors, for data that this package does not know.

    Args:
        train: Images (N, C, H, W), or vectors (N, C), and labels (N,) in {-1, +1}, the training pool.
        test: The same for the test pool.
        **kwargs: Those of :class:`~ntk_lightning.datamodules.ImageDataModule`; ``n_train`` and ``n_test`` are by
            default the whole pools, less ``n_val`` and ``fresh``; ``fresh=True`` halves what ``n_val`` leaves.

    Raises:
        TypeError: Images or labels are not tensors.
        ValueError: Images and labels differ in number, or images are no images.

    Example:
        >>> import torch
        >>> x, y = torch.randn(10, 1, 8, 8), torch.tensor([-1.0, 1.0]).repeat(5)
        >>> data = TensorData((x, y), (x, y), n_train=6)
        >>> data.setup()
        >>> len(data.train_set), len(data.test_set)
        (6, 10)
    """

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        for name, (x, y) in (("train", train), ("test", test)):
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                raise TypeError(
                    f"{name}: images and labels must be tensors, got {type(x).__name__} and {type(y).__name__}: "
                    "convert them by torch.as_tensor."
                )
            if x.dim() < 2:
                raise ValueError(f"{name}: images must be (N, C, H, W), got {tuple(x.shape)}.")
            if y.dim() != 1 or len(x) != len(y):
                raise ValueError(f"{name}: {len(x)} images need as many labels (N,), got {tuple(y.shape)}.")
        n_val, fresh = kwargs.get("n_val", 0), kwargs.get("fresh", 0)
        check_size("n_val", n_val, 0)
        check_size("fresh", int(fresh) if isinstance(fresh, bool) else fresh, 0)
        left = len(train[1]) - n_val
        n_train = left // 2 if fresh is True else left - fresh
        super().__init__(**{"n_train": n_train, "n_test": len(test[1]), **kwargs})
        self.pools = Samples(*train), Samples(*test)

    def load(self, train: bool) -> Samples:
        """Return the given pool (see the base class)."""
        return self.pools[0] if train else self.pools[1]
