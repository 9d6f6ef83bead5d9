"""What whitening and balanced classes do for the infinite NTK of Myrtle-10 on few images of CIFAR-10's ten classes.

Kernel ridge regression on one-hot targets less 0.1, for several ridges in units of the kernel's mean diagonal; the best
of them on the test images is an oracle, the same for every preparation. Published with whitening and 500 images: 50.2%
right (Nguyen et al., 2021, arXiv 2107.13034).

    python benchmarks/whitening.py FOLDER --size 16

FOLDER has parquet files of CIFAR-10 in the hub's schema. Statistics are those of the whole training pool.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine
from torch.nn.functional import one_hot

from ntk_lightning.datamodules.balanced import interleave
from ntk_lightning.datamodules.image_size import average_pool
from ntk_lightning.datamodules.normalization import normalization
from ntk_lightning.datamodules.parquet import read_parquet
from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.datamodules.whitening import zca_whitening
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import MyrtleCNN
from ntk_lightning.solvers import ridge

RIDGES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]


def read(folder: Path, split: str, size: int) -> Samples:
    """All images of a split, averaged, and their classes."""
    files = sorted(file for file in folder.rglob("*.parquet") if split in file.name)
    pool = read_parquet(files, "img", (range(5), range(5, 10)))
    return Samples(average_pool(pool.x, size), pool.y, pool.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--n-test", type=int, default=600)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--size", type=int, default=32, help="side of the images, averaged from 32x32")
    parser.add_argument("--zca", type=float, default=0.1)
    parser.add_argument("--seed", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", help='preparations, such as "zca, balanced"; by default all four')
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pool, test = (read(options.folder, split, options.size) for split in ("train", "test"))
    assert pool.classes is not None
    assert test.classes is not None
    normalize = normalization(pool.x)
    whiten = zca_whitening(lambda rows: normalize(pool.x[rows]), len(pool), options.zca)
    kernel = InfiniteNTK(MyrtleCNN(depth=options.depth, width=1, in_channels=3))
    rows = []
    for seed in options.seed:
        rng = np.random.default_rng(seed)
        order = torch.from_numpy(rng.permutation(len(pool)))
        chosen = torch.from_numpy(rng.permutation(len(test)))[: options.n_test]
        for whitened in (False, True):
            for balanced in (False, True):
                name = ", ".join(["zca"] * whitened + ["balanced"] * balanced) or "neither"
                if options.only and name not in options.only:
                    continue
                start = time.perf_counter()
                index = (interleave(order, pool.classes) if balanced else order)[: options.n]
                x, x_test = normalize(pool.x[index]), normalize(test.x[chosen])
                if whitened:
                    x, x_test = whiten(x), whiten(x_test)
                gram, cross = kernel(x).double(), kernel(x_test, x).double()
                scale = float(gram.trace()) / options.n
                y, truth = one_hot(pool.classes[index].long(), 10).double() - 0.1, test.classes[chosen]
                right = {
                    reg: float(
                        ((cross @ ridge(gram, y, reg * scale / options.n).coefficients).argmax(1) == truth)
                        .double()
                        .mean()
                    )
                    for reg in RIDGES
                }
                seconds = time.perf_counter() - start
                rows.append({"seed": seed, "preparation": name, "right": right, "seconds": seconds})
                values = "  ".join(f"{100 * value:.1f}" for value in right.values())
                print(f"seed {seed}, {name:14s} {values} % right at ridges {RIDGES}, {seconds:.0f} s", flush=True)
    if options.json:
        setting = {name: getattr(options, name) for name in ("n", "n_test", "depth", "size", "zca")}
        options.json.write_text(json.dumps({"machine": machine(), **setting, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
