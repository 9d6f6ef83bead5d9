"""Reading data without a trace in any random state, and with the same random numbers every time."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

__all__ = ["find_generators", "fixed_seed"]

_DATA = 10_000  # entries: nobody keeps so many generators, and looking at millions of samples would take seconds
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def fixed_seed(seed: int, *owners: object) -> Iterator[None]:
    """Seed every random number generator for the length of a block, and put all back after it, also after an error.

    Args:
        seed: Of the block.
        *owners: Objects whose own generators are seeded too, such as a data set's, beside the global ones of torch,
            NumPy and Python.

    Yields:
        Nothing.

    Raises:
        Exception: Whatever the block raises.

    Example:
        >>> state = torch.get_rng_state()
        >>> with fixed_seed(0):
        ...     drawn = torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    restore = [_seed(generator, seed + 1 + i) for i, generator in enumerate(find_generators(*owners))]
    failed: Exception | None = None
    try:
        with isolate_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            try:
                yield
            except Exception as error:  # isolate_rng puts nothing back where an error passes through it
                failed = error
    finally:
        for put_back in restore:
            put_back()
    if failed is not None:
        raise failed


def find_generators(*owners: object) -> list[Any]:
    """Find the random number generators that objects use.

    They are looked for in attributes, containers, closures, partials, and among the variables of a module that a
    function or a method of a met object's class names.

    Args:
        *owners: The objects; what is in modules and arrays, and in containers of more than 10,000 entries, which are
            data, is not looked at.

    Returns:
        Generators of torch, NumPy and Python, each once.

    Example:
        >>> generator = torch.Generator()
        >>> find_generators({"transforms": [lambda x: x + torch.rand(1, generator=generator)]}) == [generator]
        True
    """
    found: list[Any] = []
    seen: dict[int, object] = {}  # keeps the objects, so that no number is given out again
    level: list[Any] = list(owners)
    while level:  # breadth first: what the objects of a level refer to is the next level
        inner: list[Any] = []
        for item in level:
            if id(item) in seen or isinstance(item, (ModuleType, Tensor, np.ndarray)):
                continue
            if isinstance(item, _GENERATORS):
                seen[id(item)] = item
                found.extend([] if isinstance(item, random.SystemRandom) else [item])  # that one has no state
            elif isinstance(item, FunctionType):
                seen[id(item)] = item
                inner += [item.__closure__, item.__defaults__, item.__kwdefaults__]
                named = [item.__globals__.get(name) for name in item.__code__.co_names]
                inner += [variable for variable in named if isinstance(variable, _GENERATORS)]
            elif isinstance(item, type):
                seen[id(item)] = item
                inner += [
                    method
                    for base in item.__mro__
                    for method in vars(base).values()
                    if isinstance(method, FunctionType)
                ]
            elif isinstance(item, (list, tuple, dict, set)) and len(item) > _DATA:
                continue
            elif gc.is_tracked(item):  # numbers, strings and tuples of them refer to nothing
                seen[id(item)] = item
                inner += gc.get_referents(item)  # its class is among them
        level = inner
    return found


def _seed(generator: Any, seed: int) -> Callable[[], None]:  # noqa: ANN401 - one of _GENERATORS
    """Seed one generator and give the function that puts its present state back."""
    if isinstance(generator, torch.Generator):
        tensor = generator.get_state()
        generator.manual_seed(seed)

        def put_back() -> None:
            generator.set_state(tensor)

        return put_back
    if isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        before, bits.state = bits.state, type(bits)(seed).state
        return lambda: setattr(bits, "state", before)
    if isinstance(generator, np.random.RandomState):
        state = generator.get_state()
        generator.seed(seed)
        return lambda: generator.set_state(state)
    python = generator.getstate()
    generator.seed(seed)
    return lambda: generator.setstate(python)
