"""The network's Taylor expansion around its initial weights; at order 1, the empirical NTK as a model."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ntk_lightning.datamodules.base import has_set, samples_of
from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import Output
from ntk_lightning.kernels.empirical.network_state import copy_network
from ntk_lightning.kernels.empirical.sample_independence import check_modes
from ntk_lightning.modules.base import NTKModule
from ntk_lightning.modules.taylor_expansion import taylor_expansion
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.spectrum import warn_above_critical

__all__ = ["LinearizedNetwork"]

_PROBE = 256  # samples that the critical learning rate is estimated from


class LinearizedNetwork(NTKModule):
    """Linearized network g1(w, x) = <grad_w f(w0, x), w - w0>: the empirical NTK at initialization, as a model.

    The term f(w0, x) is left out, as in the source paper (arXiv 2206.10012, after Lee et al., 2019, arXiv 1902.06720);
    ``include_f0`` adds it. What is trained is the displacement w - w0, which starts at 0; w0 is kept, frozen, in the
    copied network. With ``order`` k it is g_k, the Taylor expansion up to order k.

    A fit at order 1 warns where the learning rate is above the critical one, which is estimated from the kernel of the
    first 256 training samples.

    The derivative is that of reverse mode, by which networks are trained and which the kernel is made of, whatever
    the network does: see :func:`~ntk_lightning.modules.taylor_expansion.taylor_expansion`.

    Args:
        net: Maps inputs (n, ...) to outputs (n, num_outputs), or to what ``output`` takes; w0 is its current weights,
            copied. Frozen parameters stay frozen.
        optimizer: Shared by every model of a comparison.
        order: Highest order of the expansion.
        include_f0: Add f(w0, x): with order 1, the true linearization of f.
        output: The one output to expand, or None for all; or a function of what the network returns to (n,
            num_outputs), such as ``lambda out: out.logits[:, -1]``.

    Raises:
        TypeError: The network is a scripted module.
        ValueError: The network has no trainable parameter, or the order is below 1.

    Example:
        >>> from ntk_lightning.networks import MLP
        >>> LinearizedNetwork(MLP(width=8, depth=1, in_features=4))(torch.ones(2, 4)).tolist()
        [[0.0], [0.0]]
    """

    label: ClassVar[str] = "linearized network"

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerConfig = OptimizerConfig(),
        order: int = 1,
        include_f0: bool = False,
        output: Output = None,
    ) -> None:
        super().__init__(optimizer)
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}.")
        if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
            raise TypeError("A scripted module cannot be called with other weights: give it before torch.jit.script.")
        self.order, self.include_f0, self.output = order, include_f0, output
        self._names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        if not self._names:
            raise ValueError("The network has no trainable parameter to linearize in: set requires_grad=True on some.")
        self.net = copy_network(net).requires_grad_(False)
        w0 = dict(self.net.named_parameters())
        self.displacement = nn.ParameterList([torch.zeros_like(w0[name]) for name in self._names])

    def forward(self, x: Any) -> Tensor:  # noqa: ANN401 - whatever the network takes
        """Evaluate the expansion.

        Args:
            x: Inputs (n, ...): a tensor, a tuple or list of arguments, or a mapping of keywords.

        Returns:
            Outputs (n, num_outputs).

        Raises:
            ValueError: A layer normalizes by statistics of the batch, or the network cannot be differentiated.
        """
        check_modes(self.net, dropout=False)
        parameters = dict(self.net.named_parameters())
        w0: dict[str, Tensor] = {name: parameters[name] for name in self._names}
        displacement: dict[str, Tensor] = dict(zip(self._names, self.displacement, strict=True))
        return taylor_expansion(self.net, w0, displacement, x, self.order, self.include_f0, self.output)

    def on_train_start(self) -> None:
        """Warn where the learning rate is above the critical one of the kernel of the first training samples."""
        if self.order > 1 or not self.trainer.is_global_zero or not has_set(self.trainer, "train"):
            return
        x = Inputs.of(samples_of(self.trainer, "train").x)[:_PROBE].cast(cast(torch.dtype, self.dtype))
        x = x.with_leaves(leaf.to(self.device) for leaf in x.leaves)
        net = copy_network(self.net)
        for name in self._names:  # the kernel's parameters are those that require gradients
            net.get_parameter(name).requires_grad_(True)
        with isolate_rng(), torch.no_grad():
            num_outputs = self(x[:1]).numel()
            warn_above_critical(evaluation_ntk(net, output=self.output)(x), [self.optimizer_config], num_outputs)
