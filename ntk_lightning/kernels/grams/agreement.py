"""Whether all processes of a run hold one and the same network and samples, compared by checksums.

The blocks of a divided Gram are only parts of one kernel if every process computes its own with the same network on the
same samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn

__all__ = ["agree_on_kernel", "agree_on_tensors", "checksum", "lines_of", "on_all_ranks", "share_buffers"]

_CHUNK = 2**18  # entries that are summed at a time
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry
_ROUNDING = 1e-5  # of the largest entry: what the same code may give on machines of different make


def checksum(tensors: Iterable[Tensor]) -> int:
    """Sum the bits of all entries with pseudo-random odd weights, modulo 2^64; one changed entry changes the sum.

    Args:
        tensors: Any number, of any shape, dtype and device.

    Returns:
        The checksum, the same on every machine.

    Example:
        >>> checksum([torch.tensor([1.0, 2.0])]) == checksum([torch.tensor([2.0, 1.0])])
        False
    """
    total = 0
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = real.detach().contiguous().reshape(-1).view(_BITS[real.element_size()])
        for chunk in bits.split(_CHUNK):
            part = int((chunk.long() * _odd_weights(chunk.device)[: len(chunk)]).sum())  # wraps around modulo 2^64
            total = (total * 0x9E3779B97F4A7C15 + part + 1) % 2**64  # an odd factor: the order of chunks counts
    return total


def on_all_ranks(fact: bool) -> bool:
    """Tell whether something holds on every rank of the default process group, so that all decide alike.

    Args:
        fact: Whether it holds here.

    Returns:
        True if it holds everywhere.
    """
    return all(_gather(fact))


def lines_of(value: object, name: str) -> dict[str, str]:
    """Take the text of an object apart, to compare it across processes.

    Args:
        value: What ``repr`` shows as it computes.
        name: What to call it in a message.

    Returns:
        The lines of its ``repr``, without addresses, which differ between processes.

    Example:
        >>> lines_of(nn.Sequential(nn.ReLU()), "network")["network, line 2"]
        '(0): ReLU()'
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return {f"{name}, line {i}": line.strip() for i, line in enumerate(text.splitlines(), 1)}


def agree_on_tensors(tensors: Mapping[str, Tensor], advice: str, texts: Mapping[str, str] | None = None) -> None:
    """Raise on every rank of the default process group if their tensors differ by more than rounding.

    Args:
        tensors: By name, for the message.
        advice: What to do about it, for the message.
        texts: What is no tensor and must be equal too, by name.

    Raises:
        ValueError: Names, shapes, dtypes, values or texts differ.

    Example:
        >>> agree_on_tensors({"training inputs": torch.ones(2)}, "seed the split")  # a single process agrees
    """
    if _world_size() == 1:
        return
    forms: dict[str, Any] = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    forms |= texts or {}
    everywhere = _gather((forms, {name: checksum([tensor]) for name, tensor in tensors.items()}))
    first, sums = everywhere[0]
    for rank, (other, _) in enumerate(everywhere):
        if other != first:
            name = next(name for name in [*first, *other] if first.get(name) != other.get(name))
            raise ValueError(
                f"Processes differ in their {name}: {_form(first.get(name))} on process 0, {_form(other.get(name))} on "
                f"process {rank}: {advice}"
            )
    for name, tensor in tensors.items():  # in the same order everywhere, as each may need the others' help
        if all(found[name] == sums[name] for _, found in everywhere) or on_all_ranks(_near_first_rank(tensor)):
            continue
        differing = [rank for rank, (_, found) in enumerate(everywhere) if found[name] != sums[name]]
        raise ValueError(f"The {name} of process {differing[0]} differ from those of process 0: {advice}")


def agree_on_kernel(kernel: Callable[..., Any]) -> None:
    """Make sure that all ranks of the default process group hold one kernel; its buffers become those of rank zero.

    Args:
        kernel: An ``nn.Module``, which a run keeps equal by its parameters only: batch normalization updates its
            statistics on each rank. Of what is no tensor its ``repr`` is compared. Other callables cannot be.

    Raises:
        ValueError: Parameters or ``repr`` differ.
    """
    if _world_size() == 1 or not isinstance(kernel, nn.Module):
        return
    agree_on_tensors(
        {f"parameter {name!r}": parameter for name, parameter in kernel.named_parameters()},
        "make it alike on every process, from one seed or checkpoint, and train it under one strategy.",
        lines_of(kernel, "kernel"),
    )
    share_buffers(kernel)


def share_buffers(module: nn.Module) -> None:
    """Overwrite the buffers of a module by those of rank zero of the default process group.

    Args:
        module: Any module; nothing happens in a single process, nor to buffers that it keeps from DDP.

    Raises:
        ValueError: Their names, shapes or dtypes differ.
    """
    if _world_size() == 1:
        return
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in ignored}
    forms = _gather({name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()})
    if any(form != forms[0] for form in forms):
        names = sorted(
            {name for form in forms for name in {**forms[0], **form} if form.get(name) != forms[0].get(name)}
        )
        raise ValueError(f"Processes differ in the shapes of the buffers {names}: make them alike on every process.")
    with torch.no_grad():
        for buffer in buffers.values():
            values = buffer.contiguous()
            distributed.broadcast(values, 0)
            buffer.copy_(values)


@cache
def _odd_weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator) * 2 + 1).to(device)


def _near_first_rank(tensor: Tensor) -> bool:
    """Compare a tensor with that of rank zero, to rounding; call it on every rank."""
    first = tensor.detach().clone().contiguous()
    distributed.broadcast(first, 0)
    if not tensor.is_floating_point():
        return torch.equal(tensor, first)
    return torch.allclose(tensor, first, rtol=0, atol=_ROUNDING * float(first.abs().max()) if first.numel() else 0.0)


def _form(form: tuple[tuple[int, ...], torch.dtype] | str | None) -> str:
    return "none" if form is None else form if isinstance(form, str) else f"{form[0]} in {form[1]}"


def _gather(value: object) -> list[Any]:
    everywhere: list[Any] = [value]
    if _world_size() > 1:
        everywhere *= _world_size()
        distributed.all_gather_object(everywhere, value)
    return everywhere


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
