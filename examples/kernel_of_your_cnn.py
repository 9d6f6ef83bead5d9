"""The kernels of a CNN of your own, on real images: any nn.Sequential of the supported layers has an infinite one.

Prints how its empirical NTK at initialization comes to agree with the infinite one as the network grows wider, and how
well fits with either kernel do.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ntk_lightning.datamodules import FashionMNISTBinary
from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.networks import NTKConv2d, NTKLinear
from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import kernel_sgd


def your_cnn(width: int) -> nn.Sequential:
    """Make a network; change its layers as you like. This definition gives the finite network and both kernels."""
    return nn.Sequential(
        *(NTKConv2d(1, width, 3), nn.ReLU(), nn.AvgPool2d(2)),
        *(NTKConv2d(width, width, 3), nn.ReLU(), nn.AvgPool2d(2)),
        *(NTKConv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), NTKLinear(width, 1)),
    )


def distance(kernel: Tensor, limit: Tensor) -> float:
    """Frobenius distance of a kernel from its limit, relative to the limit."""
    return float((kernel - limit).norm() / limit.norm())


def main() -> None:
    """Compare and fit the kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--n", type=int, default=128, help="images to train on, and to test on")
    parser.add_argument("--probe", type=int, default=32, help="images on which the kernels are compared")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32, 128], help="channels of the finite networks")
    parser.add_argument("--seeds", type=int, default=8, help="initializations of each width")
    options = parser.parse_args()

    data = FashionMNISTBinary(n_train=options.n, n_test=options.n)
    data.setup()
    train, test = data.train_set, data.test_set
    assert train is not None
    assert test is not None

    print(f"Empirical NTK against infinite NTK on {options.probe} images, {options.seeds} initializations:")
    probe, infinite = train.x[: options.probe], InfiniteNTK(your_cnn(1))
    limit = infinite(probe)
    for width in options.widths:
        distances = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            distances.append(distance(EmpiricalNTK(your_cnn(width))(probe), limit))
        print(f"  width {width:4d}: relative distance {sum(distances) / len(distances):.3f}")

    print(f"Kernel fits on {options.n} images (pullover or coat), tested on {options.n}:")
    torch.manual_seed(0)
    empirical = EmpiricalNTK(your_cnn(options.widths[-1]))
    for name, kernel in ((f"empirical, width {options.widths[-1]}", empirical), ("infinite", infinite)):
        gram, cross = kernel(train.x), kernel(test.x, train.x)
        optimizer = OptimizerConfig(lr=0.5 * critical_learning_rate(gram), momentum=0.9, batch_size=32, epochs=100)
        fit = kernel_sgd(gram, train.y, optimizer, test=(cross, test.y))
        print(
            f"  {name}: test error {fit.optimal_error:.1%} at the best step (oracle), {fit.last_error:.1%} at the last"
        )


if __name__ == "__main__":
    main()
