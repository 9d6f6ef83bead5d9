"""A kernel model trained in coefficient space, step for step as a network of that kernel would be in weight space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Trainer
from torch import Tensor, nn

from ntk_lightning.datamodules.base import Batch, has_set, samples_of
from ntk_lightning.kernels.grams.distributed import distributed_cross, distributed_gram, distributed_gram_and_cross
from ntk_lightning.kernels.grams.gram_and_cross import JointKernel, gram_and_cross
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.kernels.infinite.infinite_ntk import Backend, InfiniteNTK, Kind
from ntk_lightning.modules.base import NTKModule
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.precision import own_precision
from ntk_lightning.spectrum import warn_above_critical

__all__ = ["InfiniteNTKReadout", "KernelReadout"]


class FunctionalGradient(torch.autograd.Function):
    """K[batch] @ a, whose backward is the functional gradient: the incoming gradient, scattered to the batch's rows.

    The gradient of the loss with respect to a would be K[batch].T @ g. A gradient step in the weights of a model
    f(x) = <phi(x), w> moves f by functions K(., x_b) with weights g_b, which is a step of g in the coefficients.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, rows: Tensor, index: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        """Multiply kernel rows (b, n) with coefficients (n, C)."""
        ctx.save_for_backward(index)
        ctx.shape = coefficients.shape
        with own_precision(rows.device.type):
            return rows @ coefficients

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's context
        """Scatter (b, C) into zeros (n, C)."""
        (index,) = ctx.saved_tensors
        return grad_outputs[0].new_zeros(ctx.shape).index_add_(0, index, grad_outputs[0]), None, None


class KernelReadout(NTKModule):
    """Kernel model f(x) = K(x, X) a on the training inputs X, with a = 0 at the start.

    Trained by the Trainer like a network: one SGD step equals, to rounding, the step that a linear model with this
    kernel takes in weight space on the same batch. With ``EmpiricalNTK(net)`` it is the linearized network.

    The training inputs come from the data module, whose batches carry their positions; the Gram of the training set is
    computed when the fit starts. The training inputs and coefficients are part of the checkpoint.

    Args:
        kernel: Maps inputs (n1, ...), (n2, ...) to their Gram (n1, n2); an ``nn.Module`` is moved and saved along.
        optimizer: Shared by every arm of a comparison.
        num_outputs: Outputs of the model, which share the kernel.

    Example:
        >>> from ntk_lightning.kernels import EmpiricalNTK
        >>> from ntk_lightning.networks import MLP
        >>> model = KernelReadout(EmpiricalNTK(MLP(width=8, depth=1, in_features=4)))
    """

    label: ClassVar[str] = "kernel readout"

    coefficients: nn.Parameter
    train_inputs: Tensor

    def __init__(
        self,
        kernel: Callable[..., Tensor],
        optimizer: OptimizerConfig = OptimizerConfig(),
        num_outputs: int = 1,
    ) -> None:
        super().__init__(optimizer)
        self.kernel = kernel
        self.num_outputs = num_outputs
        self._gram: Tensor | None = None
        self._cross: dict[str, Tensor] = {}
        self._ddp_params_and_buffers_to_ignore = ["train_inputs"]  # the same everywhere: DDP would send it every step
        self._allocate((0, 0))

    def _allocate(self, shape: Sequence[int]) -> None:
        like: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.coefficients = nn.Parameter(torch.zeros(shape[0], self.num_outputs, **like))
        self.register_buffer("train_inputs", torch.zeros(*shape, **like))

    def setup(self, stage: str) -> None:
        """Take the training inputs from the data module.

        Args:
            stage: Only "fit" needs them.

        Raises:
            TypeError: The data module is not one of this package's.
            ValueError: The data module transforms its training images, which then are not in the kernel's span.
        """
        super().setup(stage)
        self._cross.clear()  # rows of another run's sets
        if stage != "fit":
            return
        x = samples_of(self.trainer, "train").x.to(self.train_inputs)
        if _has_transform(self.trainer):
            raise ValueError("A kernel model cannot train on transformed images: remove the data module's transform.")
        if not torch.equal(self.train_inputs, x):
            self._allocate(x.shape)
            self.train_inputs.copy_(x)

    def teardown(self, stage: str) -> None:
        """Let go of the Grams, which are the run's."""
        self._gram = None
        self._cross.clear()

    def on_fit_start(self) -> None:
        """Compute the Gram of the training set, and the rows of the other sets where that is cheaper now than later."""
        splits = [split for split in ("test", "val") if has_set(self.trainer, split)]
        train, *others = (self._cast(samples_of(self.trainer, split).x.to(self.device)) for split in ("train", *splits))
        with torch.no_grad():
            gram, *cross = self.gram_and_cross(train, *others)
        self._gram = self._cast(gram)
        self._cross.update(zip(splits, map(self._cast, cross), strict=False))

    def gram_and_cross(self, train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Compute the Gram of the training set; an empirical kernel's rows of the others too, while it has gradients.

        Args:
            train: Training inputs (n, ...).
            *others: Inputs (m, ...) of the evaluation sets.

        Returns:
            The Gram (n, n), and then the rows (m, n) of each set, or none.
        """
        if isinstance(self.kernel, JointKernel):
            return distributed_gram_and_cross(gram_and_cross(self.kernel, progress=True))(train, *others)
        return (distributed_gram(self.kernel, train, progress=True),)

    def on_train_start(self) -> None:
        """Warn where the learning rate is above the critical one of the Gram."""
        if self._gram is not None and self.trainer.is_global_zero:
            warn_above_critical(self._gram, [self.optimizer_config], self.num_outputs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the checkpoint's training set (see the base class)."""
        super().on_load_checkpoint(checkpoint)
        inputs = checkpoint["state_dict"]["train_inputs"]
        self._allocate(inputs.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate K(x, X) a: (n, ...) to (n, num_outputs)."""
        return self._combine(self._rows(self.kernel, x))

    def predict(self, batch: Batch, split: str) -> Tensor:
        """Evaluate the model from stored kernel rows (see the base class)."""
        positions_known = len(batch.indices) == len(batch.y)  # both are 0 where a process has no share of a batch
        if split == "train":
            if not positions_known:
                raise TypeError("A kernel model trains on Batch(x, y, index, size): use this package's data modules.")
            assert self._gram is not None, "on_fit_start computes the Gram"
            rows = self._gram[batch.indices]
            outputs: Tensor = FunctionalGradient.apply(self.coefficients, rows, batch.indices)  # type: ignore[no-untyped-call]  # torch's
            return outputs
        if not positions_known:
            return super().predict(batch, split)
        if split not in self._cross:
            others = samples_of(self.trainer, split).x.to(self.device)
            self._cross[split] = self._cast(self._rows(partial(distributed_cross, self.kernel), others))
        return self._combine(self._cross[split][batch.indices])

    def _rows(self, kernel: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not len(self.train_inputs):
            raise RuntimeError("The kernel model has no training set yet: fit it or load a checkpoint first.")
        with torch.no_grad():
            return kernel(self._cast(x), self._cast(self.train_inputs))

    def _combine(self, rows: Tensor) -> Tensor:
        with own_precision(rows.device.type):
            return self._cast(rows) @ self.coefficients

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.coefficients.dtype)


class InfiniteNTKReadout(KernelReadout):
    """The infinite-width limit of a network, trained like the network itself.

    Args:
        net: Gives the architecture only; see :class:`~ntk_lightning.kernels.InfiniteNTK`.
        optimizer: Shared by every arm of a comparison.
        num_outputs: Outputs of the model, which share the kernel.
        kind: "ntk", or "nngp" to train the readout only.
        backend: See :class:`~ntk_lightning.kernels.InfiniteNTK`.
        store: Folder to keep Grams in (:class:`~ntk_lightning.kernels.KernelStore`), where an interrupted run finds the
            finished blocks; by default none is kept.

    Raises:
        TypeError: The network has a layer without a closed form.
    """

    label: ClassVar[str] = "infinite NTK"

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerConfig = OptimizerConfig(),
        num_outputs: int = 1,
        kind: Kind = "ntk",
        backend: Backend = "auto",
        store: str | None = None,
    ) -> None:
        kernel = InfiniteNTK(net, kind, backend)
        super().__init__(kernel, optimizer, num_outputs)
        self._stored = None if store is None else stored_gram_and_cross(kernel, Path(store))

    def gram_and_cross(self, train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Compute the Gram of the training set; with a store, or from it, the rows of the others too."""
        if self._stored is None or not others:
            return super().gram_and_cross(train, *others)
        return self._stored(train, *others)


def _has_transform(trainer: Trainer) -> bool:
    return getattr(getattr(trainer, "datamodule", None), "transform", None) is not None
