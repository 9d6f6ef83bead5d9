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
from ntk_lightning.kernels.grams.agreement import agree_on_kernel
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
    """Outputs K[batch] a of a kernel model, with the functional (RKHS) gradient in place of the gradient in a.

    With g = dL/df(x_b) the gradient of a batch's loss in its outputs, (b, C): one SGD step of a linear model
    f(x) = <phi(x), w> with kernel K(x, x') = <phi(x), phi(x')> changes f by -lr sum_b g_b K(., x_b). In f = K(., X) a
    that is the step a_b <- a_b - lr g_b on the batch's coefficients, and none on the others. So the backward pass
    returns g in the batch's rows and 0 elsewhere, where plain autograd would return K[batch]^T g.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, rows: Tensor, index: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        """Multiply the kernel rows (b, n) of a batch with the coefficients (n, C) to outputs (b, C)."""
        ctx.save_for_backward(index)
        ctx.shape = coefficients.shape
        with own_precision(rows.device.type):
            return rows @ coefficients

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's context
        """Put the gradient in the outputs, (b, C), into the batch's rows of zeros (n, C)."""
        (index,) = ctx.saved_tensors
        return grad_outputs[0].new_zeros(ctx.shape).index_add_(0, index, grad_outputs[0]), None, None


class KernelReadout(NTKModule):
    """Kernel model f(x) = K(x, X) a on the n training inputs X, with coefficients a (n, num_outputs) that start at 0.

    The Trainer trains it like a network. One SGD step equals, to rounding, the step in weights of a linear model with
    this kernel on the same batch; with ``EmpiricalNTK(net)`` that model is the linearized network.

    The training inputs come from the data module, whose batches say which samples they hold. The Gram of the training
    set is computed when the fit starts. The checkpoint holds training inputs and coefficients, not the Gram.

    Args:
        kernel: Maps inputs (n1, ...), (n2, ...) to their Gram (n1, n2); an ``nn.Module`` is moved and saved along.
        optimizer: Shared by all models of a comparison.
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
        self._cross.clear()  # kernel rows of the sets of an earlier run
        if stage != "fit":
            return
        x = samples_of(self.trainer, "train").x.to(self.train_inputs)
        if _has_transform(self.trainer):
            raise ValueError("A kernel model cannot train on transformed images: remove the data module's transform.")
        if not torch.equal(self.train_inputs, x):
            self._allocate(x.shape)
            self.train_inputs.copy_(x)

    def teardown(self, stage: str) -> None:
        """Free the Grams, which belong to this run's data."""
        self._gram = None
        self._cross.clear()

    def on_fit_start(self) -> None:
        """Compute the Gram of the training set, and the kernel rows of the other sets where that is cheaper now."""
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
            agree_on_kernel(self.kernel)
            return distributed_gram_and_cross(gram_and_cross(self.kernel, progress=True))(train, *others)
        return (distributed_gram(self.kernel, train, progress=True),)

    def on_train_start(self) -> None:
        """Warn where the learning rate is above the critical one of the Gram."""
        if self._gram is not None and self.trainer.is_global_zero:
            warn_above_critical(self._gram, [self.optimizer_config], self.num_outputs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Allocate inputs and coefficients of the checkpoint's size, then as the base class."""
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
        optimizer: Shared by all models of a comparison.
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
