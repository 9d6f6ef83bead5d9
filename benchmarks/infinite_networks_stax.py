"""The networks of infinite_networks.py in neural-tangents; runs in its environment, whose Python 3.9 suffices.

Reads names of networks from the standard input, and prints for each the images a side, wall and processor seconds.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import numpy as np
from neural_tangents import stax

STD = 2**0.5
Layer = Any  # of stax: three functions


def conv(size: tuple[int, ...] = (3, 3), stride: tuple[int, ...] = (1, 1)) -> Layer:
    return stax.Conv(1, size, stride, padding="SAME", W_std=STD)


def dense() -> Layer:
    return stax.Dense(1, W_std=STD)


def myrtle(depth: int) -> Layer:
    layers = []
    for block, convolutions in enumerate({5: (2, 1, 1), 10: (3, 3, 3)}[depth]):
        if block:
            layers.append(stax.AvgPool((2, 2), strides=(2, 2)))
        for _ in range(convolutions):
            layers += [conv(), stax.Relu()]
    return stax.serial(*layers, stax.GlobalAvgPool(), dense())


def block(stride: int, project: bool) -> Layer:
    body = stax.serial(stax.Relu(), conv(stride=(stride, stride)), stax.Relu(), conv())
    shortcut = conv((1, 1), (stride, stride)) if project else stax.Identity()
    return stax.serial(stax.FanOut(2), stax.parallel(body, shortcut), stax.FanInSum())


def wide_resnet(blocks: int) -> Layer:
    layers = [block(stride if i == 0 else 1, i == 0) for stride in (1, 2, 2) for i in range(blocks)]
    return stax.serial(conv(), *layers, stax.Relu(), stax.GlobalAvgPool(), dense())


def pooled(*layers: Layer) -> Layer:
    return stax.serial(*layers, stax.GlobalAvgPool(), dense())


relu = stax.Relu()
NORM = [conv(), stax.LayerNorm(-1, 1e-5), stax.Gelu()]
NETWORKS = {
    "Myrtle-5": (myrtle(5), (32, 32, 3), 8),
    "Myrtle-10": (myrtle(10), (32, 32, 3), 8),
    "wide ResNet-16, no BatchNorm": (wide_resnet(2), (32, 32, 3), 4),
    "wide ResNet-28, no BatchNorm": (wide_resnet(4), (32, 32, 3), 4),
    "strided CNN": (pooled(conv(), relu, conv(stride=(2, 2)), relu, conv(stride=(2, 2)), relu), (32, 32, 3), 8),
    "3x3 and 1x1 convolutions": (
        pooled(conv(), relu, conv((1, 1)), relu, conv(), relu, conv((1, 1))),
        (32, 32, 3),
        8,
    ),
    "rectangular images": (myrtle(5), (16, 48, 3), 8),
    "LayerNorm CNN": (pooled(*NORM, *NORM, *NORM), (16, 16, 3), 8),
    "flattened CNN": (stax.serial(conv(), relu, conv(), relu, stax.Flatten(), dense()), (32, 32, 3), 64),
    "1-D CNN": (pooled(conv((9,), (2,)), relu, conv((9,), (2,)), relu), (256, 2), 8),
    "MLP with GELU": (
        stax.serial(*[layer for _ in range(3) for layer in (dense(), stax.Gelu())], dense()),
        (784,),
        2048,
    ),
    "self-attention": (
        pooled(
            conv((1,), (1,)),
            relu,
            stax.GlobalSelfAttention(
                1,
                n_chan_key=1,
                n_chan_val=1,
                n_heads=1,
                linear_scaling=True,
                W_key_std=1,
                W_value_std=1,
                W_query_std=1,
                W_out_std=1,
            ),
            relu,
        ),
        (64, 16),
        8,
    ),
}


def main() -> None:
    compiled = {}
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        (_, _, kernel), shape, images = NETWORKS[name]
        images = images if images > 8 else min(images, int(sys.argv[1]))
        x1, x2 = np.random.default_rng(0).standard_normal((2, images, *shape)).astype(np.float32)
        if name not in compiled:
            compiled[name] = jax.jit(lambda a, b, kernel=kernel: kernel(a, b, "ntk")).lower(x1, x2).compile()
        wall, cpu = time.perf_counter(), time.process_time()
        compiled[name](x1, x2).block_until_ready()
        print(images, time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
