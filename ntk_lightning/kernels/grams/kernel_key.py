"""Names of kernels: one text, the same in every process, for everything that a kernel's values depend on."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.infinite.infinite_ntk import InfiniteNTK

__all__ = ["describe", "digest", "kernel_key"]

_FORMAT = 2  # raise it when stored values change their meaning: old folders are then left alone
_EXECUTION_OPTIONS = {"memory"}  # of a kernel: they change its speed, not its values


def kernel_key(kernel: Callable[..., Tensor]) -> str:
    """Name what a kernel computes, the same in every process.

    An infinite kernel is its layers, kind and backend; an empirical one, and any other module, is its parameters,
    buffers and every module's class and attributes, at every place where they occur. Another callable names itself by
    a string attribute ``fingerprint``, which also takes precedence over both. The code of a class is not part of the
    name.

    Args:
        kernel: An InfiniteNTK, an nn.Module, or a callable with a ``fingerprint``.

    Returns:
        32 hexadecimal digits.

    Raises:
        TypeError: The kernel, or an attribute or hook of its modules, has no text that names it in another process too.

    Example:
        >>> from ntk_lightning.networks import MLP
        >>> wide, narrow, deep = (InfiniteNTK(MLP(width, depth, 3)) for width, depth in ((64, 1), (8, 1), (8, 2)))
        >>> kernel_key(wide) == kernel_key(narrow), kernel_key(wide) == kernel_key(deep)
        (True, False)
    """
    return digest("\n".join(describe(kernel)).encode())


def describe(kernel: Callable[..., Tensor]) -> list[str]:
    """List everything that a kernel's values depend on, to hash and to read.

    Args:
        kernel: As for :func:`kernel_key`.

    Returns:
        One line a thing.

    Raises:
        TypeError: As for :func:`kernel_key`.
    """
    lines = [f"format {_FORMAT}", _name(type(kernel))]
    fingerprint = getattr(kernel, "fingerprint", None)
    if fingerprint is not None:
        if not isinstance(fingerprint, str):
            raise TypeError(f"A kernel's fingerprint must be a string, got {fingerprint!r}.")
        return [*lines, fingerprint]
    if isinstance(kernel, InfiniteNTK):
        if "<" in str(kernel.layers):
            raise TypeError(
                f"The kernel of {kernel.layers} cannot be named in a store: a lambda, a function inside another or a "
                "callable object has no name that tells it from others. Define the function of Pointwise by def in a "
                "module, or give the kernel a string attribute `fingerprint`."
            )
        return [*lines, f"layers = {kernel.layers}", f"kind = {kernel.kind}", f"backend = {kernel.backend}"]
    if not isinstance(kernel, nn.Module):
        raise TypeError(
            f"{kernel!r} cannot be named in a store: give it a string attribute `fingerprint` that tells its values "
            "from those of every other kernel."
        )
    for path, module in kernel.named_modules(remove_duplicate=False):
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(
                f"The kernel's module {path!r} has forward hooks, which can change its values and have no name: remove "
                "them, or give the kernel a string attribute `fingerprint`."
            )
        lines.append(f"{path}: {_name(type(module))}, training={module.training}")
        for name in sorted(vars(module).keys() - vars(nn.Module()).keys() - _EXECUTION_OPTIONS):
            lines.append(f"{path}.{name} = {_text(getattr(module, name), f'{path}.{name}')}")
    first: dict[int, str] = {}
    tensors = kernel.named_parameters(remove_duplicate=False), kernel.named_buffers(remove_duplicate=False)
    for name, tensor in itertools.chain(*tensors):
        if first.setdefault(id(tensor), name) != name:
            lines.append(f"{name} is {first[id(tensor)]}")
        else:
            lines.append(f"{name}: {_text(tensor, name)}, requires_grad={tensor.requires_grad}")
    return lines


def _text(value: object, path: str) -> str:
    """An attribute's value, the same in every process."""
    match value:
        case Tensor():
            return f"tensor {digest(value)}"
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype() | torch.device():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(_text(item, path) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{_text(k, path)}: {_text(v, path)}' for k, v in value.items())}}}"
    if (inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value)) and "<" not in _name(value):
        return _name(value)
    raise TypeError(
        f"The kernel's attribute {path} = {value!r} has no text that is the same in another process: give the kernel "
        "a string attribute `fingerprint`, or the network without what is not part of it."
    )


def _name(value: Any) -> str:  # noqa: ANN401  # a class or function: no common type has both attributes
    """Its full name; of this package's own, by the folder that exports it, so that a moved file renames no kernel."""
    module: str = value.__module__
    folder = module.rpartition(".")[0]
    if folder.startswith("ntk_lightning.") and getattr(sys.modules[folder], value.__qualname__, None) is value:
        module = folder
    return f"{module}.{value.__qualname__}"


def digest(value: Tensor | bytes) -> str:
    """Hash bytes, or a tensor's dtype, shape and bytes.

    Args:
        value: What to name.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    else:
        digest.update(value)
    return digest.hexdigest()
