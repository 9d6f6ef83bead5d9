"""The base of all data sets: nested subsets of one pool, normalized, served as batches of indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from ntk_lightning.datamodules.balanced import interleave
from ntk_lightning.datamodules.batches import BatchLoader, Shuffled
from ntk_lightning.datamodules.image_size import average_pool, check_image_size
from ntk_lightning.datamodules.normalization import as_loaded, normalization
from ntk_lightning.datamodules.samples import Batch, Samples, has_set, samples_of
from ntk_lightning.datamodules.whitening import check_zca, zca_whitening
from ntk_lightning.objective import check_labels
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.whole_number import check_size

__all__ = ["Batch", "BatchLoader", "ImageDataModule", "Samples", "Shuffled", "has_set", "samples_of"]


class ImageDataModule(LightningDataModule, ABC):
    """Base of all data sets: labels in {-1, +1}, float32 images (n, C, H, W), normalized channel by channel.

    The pool of training images is put in one random order, fixed by ``subset_seed``. The training subset is its first
    ``n_train`` images, so that smaller subsets are nested in larger ones; validation and fresh samples are counted from
    its end and never meet the training subset. The test subset is the same for every ``subset_seed``. Mean and standard
    deviation of each channel come from the training subset, or from the first ``n_statistics`` images; a channel that
    is constant there is centered and not scaled, with a warning.

    A subclass gives :meth:`load`. After :meth:`setup` the data are in ``train_set``, ``test_set``, ``val_set`` and
    ``fresh_set`` (the last two None where their size is 0).

    Args:
        n_train: Samples to train on.
        n_test: Samples to test on.
        n_val: Held-out samples of the training pool, to stop on without looking at the test set.
        fresh: Size of a second training subset, disjoint from the first; True takes ``n_train``.
        subset_seed: Fixes the order of the pool.
        n_statistics: Images in the order of the pool that the normalization is taken from; ``n_train`` by default. Give
            runs with different ``n_train`` the same number, and their Grams are blocks of one.
        batch_size: Samples a training step. By default that of the trained module's optimizer config, which also fixes
            the order of the batches; a different number is an error.
        eval_batch_size: Samples a validation or test step.
        transform: Any callable on a batch of training images (b, C, H, W), such as a torchvision v2 transform.
        normalize: False leaves the images as they were loaded, in float32; whole numbers other than uint8 stay whole.
        image_size: Average the images over squares of pixels to this height and width, a divisor of theirs, before
            anything else: the statistics of the normalization are those of the smaller images, so that the result is
            the same as that of a data set which had them from the start.
        balanced: Order the pool so that the first n images have both labels equally often for every even n, and every
            class of a label as often as the others (where ``load`` tells classes). Training, validation and fresh
            samples are then of twice the rarer label's number; the test set is what it is.
        zca: Whiten the images, averaged and normalized, by mean and covariance of the whole training pool, to which no
            label counts: eigenvalues lambda become lambda / (lambda + zca * their mean), so that 0.1 leaves what is
            above the mean near 1 and the finest details small, as Shankar et al. (2020, arXiv 2003.02237) and Nguyen et
            al. (2021, arXiv 2107.13034) prepare CIFAR-10 for kernels. The variance of a channel is then less than 1.

    Raises:
        TypeError: A size is not a whole number.
        ValueError: A size is out of range, or ``image_size`` does not divide that of the images.
    """

    side: ClassVar[int | None] = None  # height and width of a data set's images, where all have the same

    def __init__(
        self,
        n_train: int = 2000,
        n_test: int = 1000,
        n_val: int = 0,
        fresh: int | bool = 0,
        subset_seed: int = 0,
        n_statistics: int | None = None,
        batch_size: int | None = None,
        eval_batch_size: int = 500,
        transform: Callable[[Tensor], Tensor] | None = None,
        normalize: bool = True,
        image_size: int | None = None,
        balanced: bool = False,
        zca: float | None = None,
    ) -> None:
        super().__init__()
        self.n_train, self.n_test, self.n_val = n_train, n_test, n_val
        self.n_statistics = n_train if n_statistics is None else n_statistics
        for name, value, least in (
            ("n_train", n_train, 1),
            ("n_test", n_test, 1),
            ("n_val", n_val, 0),
            ("fresh", int(fresh) if isinstance(fresh, bool) else fresh, 0),
            ("subset_seed", subset_seed, 0),
            ("n_statistics", n_statistics, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("image_size", image_size, 1),
        ):
            check_size(name, value, least)
        if self.side is not None:
            check_image_size(image_size, (1, self.side, self.side))
        self.n_fresh = n_train if fresh is True else int(fresh)
        self.subset_seed, self.batch_size, self.eval_batch_size = subset_seed, batch_size, eval_batch_size
        check_zca(zca)
        self.transform, self.normalize = transform, normalize
        self.image_size, self.balanced, self.zca = image_size, balanced, zca
        self.train_set: Samples | None = None
        self.test_set: Samples | None = None
        self.val_set: Samples | None = None
        self.fresh_set: Samples | None = None

    @abstractmethod
    def load(self, train: bool) -> Samples:
        """Load a whole pool.

        Args:
            train: The training pool, or else the test pool.

        Returns:
            Images (N, C, H, W), float or uint8, and labels (N,) in {-1, +1}, in an order that never changes; where a
            label stands for several classes, their numbers (N,) too.
        """

    def setup(self, stage: str | None = None) -> None:
        """Draw the subsets; average, normalize and whiten their images, in this order. The second call does nothing.

        Args:
            stage: Ignored: every stage needs the training subset's statistics.

        Raises:
            ValueError: More samples are asked for than there are, the training pool has one class only, the two pools
                have images of different shapes, a label is not -1 or +1, an image is not finite, or ``image_size`` does
                not divide the images' side.
        """
        if self.train_set is not None:
            return
        pool, test = self.load(train=True), self.load(train=False)
        shape, other = tuple(pool.x.shape[1:]), tuple(test.x.shape[1:])
        if not shape or shape != other:
            raise ValueError(
                f"Training images of shape {shape} and test images of shape {other}: both must be (C, H, W), the same."
            )
        check_image_size(self.image_size, shape)
        if (pool.y == pool.y[0]).all():
            raise ValueError(
                f"All {len(pool)} samples of the training pool of {type(self).__name__} have the label "
                f"{pool.y[0].item():g}: give samples of both classes."
            )
        order, usable = self._order(pool)
        needed = self.n_train + self.n_val + self.n_fresh
        for name, asked, have in (
            ("n_train + n_val + fresh" + " of balanced subsets" * self.balanced, needed, usable),
            ("n_statistics", self.n_statistics, len(pool)),
            ("n_test", self.n_test, len(test)),
        ):
            if asked > have:
                raise ValueError(f"{name} = {asked}, but {type(self).__name__} has {have} such samples: ask for fewer.")
        prepare = self._preparation(pool, order)

        def take(samples: Samples, index: Tensor) -> Samples:
            taken = self._take(samples, index)
            x = prepare(taken.x)
            if not torch.isfinite(x).all():
                raise ValueError("An image has a pixel that float32 cannot hold: scale the data.")
            return replace(taken, x=x)

        ends = usable - self.n_val
        self.test_set = take(test, _permutation(0, len(test))[: self.n_test])
        self.val_set = take(pool, order[ends:usable].flip(0)) if self.n_val else None
        self.fresh_set = take(pool, order[ends - self.n_fresh : ends].flip(0)) if self.n_fresh else None
        self.train_set = take(pool, order[: self.n_train])

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """Names of the validation loaders in order: the test set watched by the oracle, then the validation set."""
        return ("test", "val") if self.n_val else ("test",)

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """Batch size and order: the trained module's, or ``batch_size`` outside a Trainer.

        Raises:
            ValueError: ``batch_size`` is given and differs from the trained module's.
        """
        module = getattr(self.trainer, "lightning_module", None)
        config: OptimizerConfig | None = getattr(module, "optimizer_config", None)
        if config is None:
            return OptimizerConfig(batch_size=self.batch_size or OptimizerConfig.batch_size)
        if self.batch_size not in (None, config.batch_size):
            raise ValueError(
                f"batch_size={self.batch_size} of the data and batch_size={config.batch_size} of the optimizer config "
                "differ: give it to the optimizer config only."
            )
        return config

    def train_dataloader(self) -> BatchLoader:
        """Make the loader of shuffled training batches."""
        samples = _present(self.train_set)
        return self._loader(samples, Shuffled(len(samples), self.optimizer_config), self.transform)

    def val_dataloader(self) -> list[BatchLoader]:
        """Make one loader for each of :attr:`evaluation_splits`."""
        sets = (self.test_set, self.val_set) if self.n_val else (self.test_set,)
        return [self._in_order(_present(samples)) for samples in sets]

    def test_dataloader(self) -> BatchLoader:
        """Make the loader of the test set."""
        return self._in_order(_present(self.test_set))

    def predict_dataloader(self) -> BatchLoader:
        """Make the loader of the test set, for predictions."""
        return self.test_dataloader()

    def _preparation(self, pool: Samples, order: Tensor) -> Callable[[Tensor], Tensor]:
        """Make the function that normalizes and whitens averaged images."""
        # of the whole pool in its own order, so that sums round alike for every seed, whose subsets then share kernels
        whole = torch.arange(len(pool))
        counted = whole if self.n_statistics == len(pool) else order[: self.n_statistics]
        normalize = normalization(self._take(pool, counted).x) if self.normalize else as_loaded
        if self.zca is None:
            return normalize
        whiten = zca_whitening(lambda rows: normalize(self._take(pool, whole[rows]).x), len(pool), self.zca)
        return lambda images: whiten(normalize(images))

    def _order(self, pool: Samples) -> tuple[Tensor, int]:
        """Order the pool (N,), and count the samples at the beginning that subsets are taken from."""
        order = _permutation(self.subset_seed, len(pool))
        if not self.balanced:
            return order, len(order)
        check_labels(pool.y.float())
        for strata in (pool.classes, pool.y):  # labels last: every pair has both, and the classes of each take turns
            order = order if strata is None else interleave(order, strata)
        return order, 2 * min(int((pool.y == label).sum()) for label in (-1, 1))

    def _take(self, pool: Samples, index: Tensor) -> Samples:
        """Take samples of a pool, with their images averaged to ``image_size``."""
        samples = Samples(pool.x[index], pool.y[index].float())
        check_labels(samples.y)
        if samples.x.is_complex():
            raise TypeError(f"Images must be real, got {samples.x.dtype}: give real and imaginary parts as channels.")
        if samples.x.is_floating_point() and not torch.isfinite(samples.x).all():
            raise ValueError("An image has a NaN or infinite pixel: clean the data.")
        return replace(samples, x=average_pool(samples.x, self.image_size))

    def _in_order(self, samples: Samples) -> BatchLoader:
        return self._loader(samples, torch.split(torch.arange(len(samples)), self.eval_batch_size))

    def _loader(
        self,
        samples: Samples,
        sampler: Sequence[Tensor] | Shuffled,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> BatchLoader:
        if self.trainer is None:
            return BatchLoader(samples, sampler, transform)
        on_device = samples.to(self.trainer.strategy.root_device)
        return BatchLoader(on_device, sampler, transform, self.trainer.global_rank, self.trainer.world_size)


def _present(samples: Samples | None) -> Samples:
    if samples is None:
        raise RuntimeError("The data are not set up: call setup() first.")
    return samples


def _permutation(seed: int, n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(np.random.SeedSequence((seed, 0x5EED))).permutation(n))
