"""A width study from Python: how fast test error falls with samples, for networks of several widths and their limit.

The same study could be a YAML file: see cli_configs/studies, which `read_config` reads. It is resumed when it is run
again with the same folder, and draws what `python -m ntk_lightning figures FOLDER` draws.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from ntk_lightning.studies import (
    Arm,
    FigureConfig,
    Grid,
    StudyConfig,
    draw_study,
    exponents_table,
    fit_series,
    read_study,
    run_study,
)


def main() -> None:
    """Run the study, print its exponents and draw its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[32, 64, 128], help="images to train on")
    parser.add_argument("--n-test", type=int, default=128, help="images to test on")
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 32], help="channels of the networks")
    parser.add_argument("--seeds", type=int, default=2, help="subsets and initializations")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--output", help="folder of the results (default: a temporary one)")
    options = parser.parse_args()

    study = StudyConfig(
        name="width_study",
        title="Error against samples at several widths",
        data={
            "class_path": "ntk_lightning.datamodules.FashionMNISTBinary",
            "init_args": {"n_test": options.n_test},
        },
        net={"class_path": "ntk_lightning.networks.FiveLayerCNN", "init_args": {"in_channels": 1}},
        arms=[
            *(Arm(f"width {width}", "network", Grid(width=[width])) for width in options.widths),
            Arm("infinite NTK", "infinite"),
        ],
        grid=Grid(
            n=options.n,
            width=options.widths[:1],
            seed=list(range(options.seeds)),
            lr=[0.5],
            momentum=[0.9],
            batch_size=[16],
            epochs=[options.epochs],
        ),
        figure=FigureConfig(x="n", caption="The infinite NTK is fitted by the same steps as the networks."),
    )
    folder = Path(options.output or tempfile.mkdtemp(prefix="width_study_"))
    results = read_study(run_study(study, folder))
    Console(width=130).print(exponents_table(results))
    for line in fit_series(results):
        if line.fit:
            print(f"{line.series.label}: L(n) = {line.fit.alpha:.2f} n^-{line.fit.beta:.3f}")
    picture = folder / "width_study.png"
    draw_study(results).savefig(picture)
    print(f"Figure: {picture}")


if __name__ == "__main__":
    main()
