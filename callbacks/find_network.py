"""Which module of a run is the network whose kernel is measured, and what it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import Output, select_output
from ntk_lightning.kernels.empirical.trial import share_findings
from ntk_lightning.kernels.grams.agreement import agree_on_kernel
from ntk_lightning.precision import at_least_float32
from ntk_lightning.pytrees import Tree
from ntk_lightning.solvers.kernel_fit import error_and_loss

__all__ = [
    "count_outputs",
    "error_and_loss_of",
    "evaluating",
    "evaluation_kernel",
    "network",
    "network_name",
    "predict",
]

_CHUNK = {"cpu": 32}  # samples that are predicted at once, 500 elsewhere: on a CPU small tensors stay in the cache


def network_name(module: LightningModule, name: str | None = None) -> str:
    """Choose the network of a Lightning module.

    Args:
        module: Module that holds it, built.
        name: Attribute path of the submodule that maps inputs to outputs; "" is the module itself, by its forward.
            None finds it: the submodule called ``net``; else the only child with parameters that are trained, where the
            module has none beside it, or the only one of that child if it has no forward; else the module itself,
            where it has a forward.

    Returns:
        The attribute path.

    Raises:
        AttributeError: There is no such submodule, or none or several could be meant.
    """
    children = [child for child, _ in module.named_children()]
    give = (
        'Give the callback the one that maps inputs to outputs as network=..., or network="" for the module itself, by '
        "its forward."
    )
    if name is not None:
        try:
            module.get_submodule(name)
        except AttributeError as error:
            raise AttributeError(
                f"{type(module).__name__} has no network {name!r}; its submodules are {children}. {give}"
            ) from error
        return name
    if "net" in children:
        return "net"
    trained = [child for child, part in module.named_children() if _is_trained(part.parameters())]
    own = _is_trained(module.parameters(recurse=False))
    if len(trained) == 1 and not own:
        return _first_with_forward(module, trained[0])
    if (trained or own) and _has_forward(module):
        return ""
    found = f"the submodules {trained} are trained, and it has no forward" if trained else "nothing in it is trained"
    raise AttributeError(f"The network of {type(module).__name__} is not known: {found}. {give}")


def _first_with_forward(module: LightningModule, path: str) -> str:
    """Go into containers of one trained part, which only keep it."""
    part = module.get_submodule(path)
    if type(part).forward is not nn.Module.forward:
        return path
    inner = [child for child, held in part.named_children() if _is_trained(held.parameters())]
    if len(inner) != 1 or _is_trained(part.parameters(recurse=False)):
        raise AttributeError(
            f"The network of {type(module).__name__} is not known: its {path!r} has no forward, and the parts {inner}. "
            "Give the callback the one that maps inputs to outputs as network=..."
        )
    return _first_with_forward(module, f"{path}.{inner[0]}")


def _is_trained(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _has_forward(module: nn.Module) -> bool:
    """Tell whether a module defines a forward: those of Lightning and PyTorch's base classes only raise."""
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return owner.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning")


def network(module: LightningModule, name: str | None = None) -> nn.Module:
    """Find the network inside a Lightning module.

    Args:
        module: Module that holds it.
        name: As of :func:`network_name`.

    Returns:
        The submodule.

    Raises:
        AttributeError: There is no such submodule, or none or several could be meant.
    """
    return module.get_submodule(network_name(module, name))


def predict(net: nn.Module, x: Tree, output: Output = None) -> Tensor:
    """Compute the outputs that a kernel is of.

    Args:
        net: Network, in the mode that it is in.
        x: Inputs of n samples: a tensor, a tuple or list of arguments, or a mapping of keywords.
        output: As of :class:`~ntk_lightning.kernels.EmpiricalNTK`.

    Returns:
        Outputs (n, C).

    Raises:
        ValueError: The network returns something else.
    """
    inputs = Inputs.of(x)
    returned = select_output(output, inputs.call(net), len(inputs))
    outputs = returned.reshape(len(inputs), -1)
    return outputs[:, output, None] if isinstance(output, int) else outputs


def count_outputs(net: nn.Module, x: Tree, output: Output = None) -> int:
    """Count the outputs of a network, on one sample and in evaluation mode.

    Args:
        net: Network on the device of the training; it is left as it is.
        x: Inputs (n, ...), of which the first sample is taken.
        output: As of :func:`predict`.

    Returns:
        The number C where it maps (n, ...) to (n, C); 1 where it maps to (n,).
    """
    inputs = Inputs.of(x)[:1]
    with torch.no_grad(), evaluating(net):
        returned = select_output(output, inputs.call(net), 1)
    return 1 if isinstance(output, int) else returned.numel()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode for a while.

    Args:
        module: The module.

    Yields:
        None; every part is back in its own mode at the end.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def evaluation_kernel(
    trainer: Trainer, module: LightningModule, name: str | None, memory: str | int, output: Output = None
) -> EmpiricalNTK:
    """Make the empirical NTK of a module's network, in evaluation mode and the same on all processes.

    Args:
        trainer: Trainer of the run, in training or after it.
        module: Module that holds the network; it is left as it is.
        name: As of :func:`network_name`.
        memory: Budget of the kernel, such as "4GB".
        output: As of the kernel.

    Returns:
        The kernel at the network's current weights, on the device of the training; its buffers, such as running
        statistics, are those of rank zero.

    Raises:
        ValueError: The weights differ between processes.
    """
    net = network(module, name)
    kernel = evaluation_ntk(net, memory, output).to(trainer.strategy.root_device)
    share_findings(kernel.net, kernel.trainable, net)  # one trial for all steps of a run
    agree_on_kernel(kernel)
    return kernel


def error_and_loss_of(net: nn.Module, test: Samples, output: Output = None) -> tuple[float, float]:
    """Measure a network's test error and test loss.

    Args:
        net: In the mode that it is in.
        test: Test set, with targets (n,) or (n, C) that a kernel is fitted to.
        output: As of :func:`predict`.

    Returns:
        Fraction of errors and mean squared error; 1 and infinity where an output is not finite.
    """
    with torch.no_grad():
        size = _CHUNK.get(test.y.device.type, 500)
        chunks = [test.take(slice(i, i + size)) for i in range(0, len(test), size)]
        outputs = torch.cat([predict(net, chunk.x, output) for chunk in chunks])
    outputs = outputs.to(at_least_float32(outputs.dtype))
    error, loss = error_and_loss(outputs, test.y.reshape(len(test), -1).to(outputs.dtype))
    return float(error), float(loss)
