"""A network as a graph of operations, and as a tuple of layers."""

from __future__ import annotations

from collections.abc import Sequence

from ntk_lightning.kernels.infinite.architecture import Add, Concat, Graph, Layer, Node, Operation, Product, Sum

__all__ = ["to_graph", "to_layers"]


def to_graph(layers: Sequence[Layer]) -> Graph:
    """Spread layers out into nodes.

    Args:
        layers: A network's layers.

    Returns:
        The same network; a chain has nodes whose inputs are (0,), (1,), (2,) and so on.

    Example:
        >>> from ntk_lightning.kernels.infinite.architecture import Flatten, Scale
        >>> to_graph([Scale(2.0), Sum((Flatten(),), ())]).nodes[1:]
        (Node(operation=Flatten(), inputs=(1,)), Node(operation=Add(), inputs=(2, 1)))
    """
    nodes: list[Node] = []

    def append(operation: Operation, *inputs: int) -> int:
        nodes.append(Node(operation, inputs))
        return len(nodes)

    def extend(layers: Sequence[Layer], at: int) -> int:
        for layer in layers:
            match layer:
                case Graph(inner):
                    places = [at]
                    for node in inner:
                        places.append(append(node.operation, *(places[i] for i in node.inputs)))
                    at = places[-1]
                case Sum(body, shortcut):
                    at = append(Add(), extend(body, at), extend(shortcut, at))
                case _:
                    at = append(layer, at)
        return at

    extend(layers, 0)
    return Graph(tuple(nodes))


def to_layers(graph: Graph) -> tuple[Layer, ...]:
    """Fold a graph into a chain, with sums of two branches as single layers.

    Args:
        graph: A network's graph.

    Returns:
        The layers; the graph itself as the only one where its values meet in other ways.

    Example:
        >>> from ntk_lightning.kernels.infinite.architecture import Flatten, Scale
        >>> twice = Node(Flatten(), (1,)), Node(Add(), (2, 1))
        >>> to_layers(Graph((Node(Scale(2.0), (0,)), *twice)))
        (Scale(factor=2.0), Sum(body=(Flatten(),), shortcut=()))
    """
    fork = [0]  # of each value, the last one before it that every path from the input to it passes
    for node in graph.nodes:
        common = node.inputs[0]
        for other in node.inputs[1:]:
            while common != other:
                if common > other:
                    common = fork[common]
                else:
                    other = fork[other]
        fork.append(common)
    folded = 0

    def chain(start: int, end: int) -> list[Layer] | None:
        nonlocal folded
        layers: list[Layer] = []
        while end > start:
            folded += 1
            node = graph.nodes[end - 1]
            match node.operation:
                case Add():
                    branches = [chain(fork[end], value) for value in node.inputs]
                    if len(branches) != 2 or None in branches:
                        return None
                    body, shortcut = (tuple(branch or ()) for branch in branches)
                    layers.append(Sum(body, shortcut) if body else Sum(shortcut, body))  # the identity comes second
                case Product() | Concat():
                    return None
                case operation:
                    layers.append(operation)
            end = fork[end]
        return layers[::-1] if end == start else None

    layers = chain(0, len(graph.nodes))
    return (graph,) if layers is None or folded != len(graph.nodes) else tuple(layers)
