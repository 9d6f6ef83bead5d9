r"""Which operations keep a closed form: what is Gaussian, and which values are independent of each other.

In the limit the channels of a hidden value are independent draws of one random field over inputs and pixels. Affine
layers with weights of their own make it Gaussian with mean 0, and independent of every other value but those that are
made from it pixel by pixel. So a value is a linear combination of *terms*, and each term has its *roots*: the affine
layers (and the network's input, 0) whose outputs it is a function of, channel by channel. With u and v of disjoint
roots,

    E[(u + v)(u' + v')] = E[u u'] + E[v v']      where u or v has mean 0,
    E[u v u' v'] = E[u u'] E[v v'],

and the same for the NTK of sums; of products it follows by the product rule. Equal terms add up, x + x = 2 x; other
sums and products of dependent values are refused. An activation needs a Gaussian field whose channels all have one
distribution; of a concatenation of such fields it is the concatenation of their activations.

Longer than 300 lines because the rules of all operations stand here together, with their reasons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ntk_lightning.kernels.infinite.architecture import (
    Activation,
    Add,
    Attention,
    Concat,
    Conv,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalSumPool,
    Graph,
    Linear,
    Node,
    Norm,
    Operation,
    Pool,
    Product,
    Scale,
)

__all__ = ["Builder", "Value"]


@dataclass(frozen=True)
class Value:
    """What a graph holds at one place, and what is known of it.

    Args:
        index: Its number: 0 for the network's input, else 1 + that of its node.
        terms: Values whose linear combination it is, with their coefficients.
        roots: Affine layers that it is a function of, channel by channel.
        gaussian: Whether it is a Gaussian field whose channels all have one distribution.
        centered: Whether its mean is 0.
        alike: Whether all its channels have one distribution.
        flat: Whether it holds pixels as a vector, so that its entries do not.
        pooled: Whether it surely has one pixel only.
        readout: Whether each of its channels is an affine readout, of the network's last affine layer.
        parts: What it is the concatenation of.
        width: Number of its channels or features, None where that follows from the inputs.
        axes: Number of its spatial axes, None where that follows from the inputs.
    """

    index: int
    terms: tuple[tuple[int, float], ...]
    roots: frozenset[int]
    gaussian: bool = False
    centered: bool = False
    alike: bool = True
    flat: bool = False
    pooled: bool = False
    readout: bool = False
    parts: tuple[Value, ...] = ()
    width: int | None = None
    axes: int | None = None


class Builder:
    """Builds a graph, and refuses what has no closed form; ``where`` is the place of the next operation."""

    def __init__(self) -> None:
        self.input = Value(0, ((0, 1.0),), frozenset({0}), alike=False)
        self.where = ""
        self._nodes: list[Node] = []
        self._made: dict[Node, Value] = {}  # what has been computed, and need not be again
        self._values = [self.input]

    def apply(self, operation: Operation, value: Value) -> Value:
        """Feed one value to an operation of one input.

        Args:
            operation: Not a sum, a product or a concatenation.
            value: What it is fed with.

        Returns:
            Its output.

        Raises:
            ValueError: That has no closed form.
        """
        match operation:
            case Activation() if value.parts:
                return self.concat([self.apply(operation, part) for part in value.parts])
            case Activation():
                self._check_activation(operation, value)
                return self._append(operation, value, gaussian=False, centered=False, readout=False)
            case Linear() | Conv() | Attention():
                return self._append(
                    operation,
                    value,
                    roots=frozenset({len(self._nodes) + 1}),
                    gaussian=True,
                    centered=True,
                    alike=True,
                    flat=False,
                    pooled=value.pooled or isinstance(operation, Linear),
                    readout=True,
                    parts=(),
                    width=operation.fan_out,
                    axes=0 if isinstance(operation, Linear) else getattr(operation, "axes", value.axes),
                )
            case Norm():
                if not value.centered:
                    raise self._refusal(
                        f"{operation} has no closed form where it stands: the mean of its input must be 0. Put an "
                        "affine layer (NTKLinear or NTKConv2d) before it"
                    )
                return self._append(operation, value, parts=(), gaussian=value.gaussian, readout=False)
            case Dropout():
                return self._append(operation, value, parts=(), gaussian=False, readout=False)
            case Scale(factor):
                if factor == 0 or not math.isfinite(factor):
                    raise self._refusal(f"a product with {factor:g} has no kernel")
                terms = tuple((term, factor * coefficient) for term, coefficient in value.terms)
                return self._append(operation, value, parts=self._each(operation, value), terms=terms)
            case GlobalAvgPool() | GlobalSumPool():
                axes = operation.axes or value.axes
                return self._append(operation, value, parts=self._each(operation, value), pooled=True, axes=axes)
            case Flatten() if not value.pooled and value.axes != 0:
                return self._append(operation, value, parts=(), flat=True, alike=False, width=None, axes=0)
            case Flatten():
                return self._append(operation, value, parts=self._each(operation, value), axes=0)
            case Pool():
                return self._append(operation, value, parts=self._each(operation, value), axes=operation.axes)
        raise NotImplementedError(f"{operation} has not one input.")

    def add(self, left: Value, right: Value) -> Value:
        """Add two values.

        Args:
            left: One.
            right: The other.

        Returns:
            Their sum.

        Raises:
            ValueError: They depend on each other, or have both a mean.
        """
        terms = dict(left.terms)
        for term, coefficient in right.terms:
            terms[term] = terms.get(term, 0.0) + coefficient
        terms = {term: coefficient for term, coefficient in terms.items() if coefficient}
        if not terms:
            raise self._refusal("a difference of equal values leaves nothing")
        values = [self._values[term] for term in terms]
        means = sum(not value.centered for value in values)
        if means > 1:
            raise self._refusal(
                "the branches of a sum must be independent, so that their covariances add up: at most one of them may "
                "end in something else than an affine layer (NTKLinear or NTKConv2d) of its own"
            )
        if not left.roots.isdisjoint(right.roots):
            seen: set[int] = set()
            for value in values:
                if not seen.isdisjoint(value.roots):
                    raise self._refusal(
                        "the branches of a sum must be independent, but these two are made from the same values "
                        "without weights of their own between: end one of them in an affine layer (NTKLinear or "
                        "NTKConv2d)"
                    )
                seen |= value.roots
        if len(terms) == len(left.terms) + len(right.terms):
            inputs: Sequence[Value] = (left, right)
        else:  # x + x = 2 x, and (x + f(x)) + x = 2 x + f(x)
            scaled = {term: Scale(coefficient) for term, coefficient in terms.items() if coefficient != 1}
            inputs = [self.apply(scaled[v.index], v) if v.index in scaled else v for v in values]
            if len(inputs) == 1:
                return inputs[0]
        return self._append(
            Add(),
            *inputs,
            terms=tuple(terms.items()),
            gaussian=all(value.gaussian for value in inputs),
            centered=means == 0,
            readout=all(value.readout for value in inputs),
        )

    def multiply(self, left: Value, right: Value) -> Value:
        """Multiply two values entry by entry.

        Args:
            left: One.
            right: The other.

        Returns:
            Their product.

        Raises:
            ValueError: They depend on each other.
        """
        if not left.roots.isdisjoint(right.roots):
            raise self._refusal(
                "the factors of a product must be independent, but these two are made from the same values without "
                "weights of their own between: end one of them in an affine layer (NTKLinear or NTKConv2d) and an "
                "activation; for a function of one value, as x * sigmoid(x), use an activation or Pointwise"
            )
        if not (left.alike or right.alike):
            raise self._refusal(
                "in a product at most one factor may be a concatenation, a flattened image or the network's input"
            )
        centered = left.centered or right.centered
        return self._append(Product(), left, right, gaussian=False, centered=centered, readout=False)

    def concat(self, values: Sequence[Value]) -> Value:
        """Concatenate values along their channels.

        Args:
            values: In their order.

        Returns:
            The concatenation.
        """
        parts = [part for value in values for part in value.parts or (value,)]
        if len(parts) == 1:
            return parts[0]
        widths = tuple(part.width for part in parts)
        known = None if None in widths else sum(width or 0 for width in widths)
        return self._append(
            Concat(widths),
            *parts,
            parts=tuple(parts),
            gaussian=False,
            alike=False,
            centered=all(part.centered for part in parts),
            readout=all(part.readout for part in parts),
            width=known,
        )

    def graph(self, output: Value) -> Graph:
        """Finish the graph.

        Args:
            output: What the network returns.

        Returns:
            All operations that the output needs.

        Raises:
            ValueError: The output is not that of affine layers, so that a pair of inputs has no single number.
        """
        if not output.readout or not output.gaussian or output.flat:
            raise ValueError("The network must end in an NTKLinear readout to have a scalar kernel per pair of inputs.")
        needed = {output.index}
        for i in range(len(self._nodes), 0, -1):
            if i in needed:
                needed |= set(self._nodes[i - 1].inputs)
        place = {0: 0}
        nodes: list[Node] = []
        for i, node in enumerate(self._nodes, 1):
            if i in needed:
                place[i] = len(nodes) + 1
                nodes.append(Node(node.operation, tuple(place[value] for value in node.inputs)))
        return Graph(tuple(nodes))

    def _each(self, operation: Operation, value: Value) -> tuple[Value, ...]:
        """The parts of a concatenation after an operation that treats channels alike; unused ones leave no node."""
        return tuple(self.apply(operation, part) for part in value.parts)

    def _append(self, operation: Operation, *values: Value, **known: object) -> Value:
        """A new value, for which holds what holds for its inputs, but for what is known of it."""
        node = Node(operation, tuple(value.index for value in values))
        if node in self._made:
            return self._made[node]
        self._nodes.append(node)
        changes: dict[str, object] = {"index": len(self._nodes), "terms": ((len(self._nodes), 1.0),)}
        if len(values) > 1:
            changes |= {
                "roots": frozenset().union(*(value.roots for value in values)),
                "alike": all(value.alike for value in values),
                "flat": any(value.flat for value in values),
                "pooled": all(value.pooled for value in values),
                "width": next((value.width for value in values if value.width is not None), None),
                "axes": next((value.axes for value in values if value.axes is not None), None),
                "parts": (),
            }
        value = replace(values[0], **changes | known)  # type: ignore[arg-type]  # of the fields' types each
        self._values.append(value)
        if not isinstance(operation, Linear | Conv | Attention | Dropout):  # which have weights or masks of their own
            self._made[node] = value
        return value

    def _check_activation(self, activation: Activation, value: Value) -> None:
        if not value.gaussian:
            raise self._refusal(
                f"{activation} has no closed form where it stands: its input must be Gaussian. Put an affine layer "
                "(NTKLinear or NTKConv2d) before it; before a sum, at the end of every branch"
            )
        if value.flat:
            raise self._refusal(
                f"{activation} stands after nn.Flatten without an affine layer between: swap the two, since the pixels "
                "of a flattened image are not alike"
            )

    def _refusal(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}." if self.where else f"{message}.")
