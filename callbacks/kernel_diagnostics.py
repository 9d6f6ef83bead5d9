"""How the empirical NTK moves and turns during training, measured on a fixed probe set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from ntk_lightning.callbacks.extraction import Extraction, KernelNeed, shared_extraction
from ntk_lightning.callbacks.figures import draw_diagnostics, draw_layers
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.run_output import log_figure, log_metrics, log_table
from ntk_lightning.callbacks.scheduled import ScheduledCallback
from ntk_lightning.datamodules.unpack import Unpack
from ntk_lightning.kernels.decay import decay_exponents
from ntk_lightning.kernels.diagnostics import (
    centered_kernel_alignment,
    effective_rank,
    kernel_distance,
    kernel_target_alignment,
    kernel_velocity,
    leading_eigenvalues,
    target_share,
)

__all__ = ["KernelDiagnostics"]

_DECAY_SAMPLES = 500  # whose spectrum is fitted: a jackknife decomposes ten more Grams


class KernelDiagnostics(ScheduledCallback):
    """Log measures of K^t, the empirical NTK after t steps, on the first training samples.

    Centered kernel alignment with K^0 (Cortes et al., 2012), kernel-target alignment (Cristianini et al., 2001),
    distance to K^0 and velocity (Fort et al., 2020, arXiv 2010.15110), effective rank (Roy and Vetterli, 2007), leading
    eigenvalues, and the share of the labels in the leading eigenvectors: the formulas are in
    :mod:`ntk_lightning.kernels.diagnostics`. From 40 samples on also the exponents by which the spectrum and the labels
    fall (:mod:`ntk_lightning.kernels.decay`), of at most the first 500 samples, with 95% intervals. Kept in
    ``kernel_diagnostics.csv`` and drawn, but for the exponents, in ``kernel_diagnostics.png``. With ``per_layer`` also,
    in ``kernel_layers.csv`` and ``kernel_layers.png``, the kernel of every module with parameters of its own, whose sum
    K^t is: its share of the trace, and its alignment with the targets. The training is not disturbed.

    Args:
        every_n_batches: Measure every so many steps.
        log_spaced: Measure at about this many logarithmically spaced steps instead (30 if neither is given).
        at: Measure at these steps instead.
        probe_size: Samples of the probe set; fewer where the training set is smaller.
        leading: Number of leading eigenvalues, and of eigenvectors for the share of the labels.
        network: Attribute path of the submodule that maps inputs to outputs; "" is the module itself, by its forward.
            By default the submodule ``net``, else the only child with parameters, else the module itself if it has a
            forward.
        memory: Budget of an extraction, such as "4GB"; the largest counts where callbacks share an extraction.
        per_layer: Measure the kernels of the layers too, which costs another pass.
        n_train: The first samples of the training set that the probe set is taken from, by index. By default all of a
            data module that keeps its sets, and 256 of a loader.
        n_test: Has no effect alone; the same as of the other callbacks, they share their extractions.
        samples: Function of a collated batch to (inputs, targets), where it is neither (x, y, ...) nor a mapping with
            "labels", "label", "targets", "target" or "y".
        output: Function of what the network returns to (n,) or (n, C), or the number of one output.
        name: Tells several callbacks of this class apart: in files, metrics and checkpoints.

    Raises:
        ValueError: More than one schedule is given, or a number is below 1.
    """

    table = "kernel_diagnostics"

    def __init__(
        self,
        every_n_batches: int | None = None,
        log_spaced: int | None = None,
        at: Sequence[int] | None = None,
        probe_size: int = 200,
        leading: int = 5,
        network: str | None = None,
        memory: str = "4GB",
        per_layer: bool = False,
        n_train: int | None = None,
        n_test: int | None = None,
        samples: Unpack | None = None,
        output: int | Callable[[Any], Tensor] | None = None,
        name: str | None = None,
    ) -> None:
        measured = Measured(network, output, n_train, n_test, samples)
        super().__init__(every_n_batches, log_spaced, at, measured=measured, name=name)
        if not 1 <= leading <= probe_size:
            raise ValueError(f"leading must be at least 1 and at most probe_size, got {leading} and {probe_size}.")
        self.probe_size, self.leading, self.memory, self.per_layer = probe_size, leading, memory, per_layer
        self.layers: list[dict[str, Any]] = []  # a row for each step and layer
        self._initial: Tensor | None = None  # K^0 and the kernel measured before this one
        self._previous: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before anything is trained, that everything is there."""
        self.measured.check(trainer, pl_module, evaluation=False)
        if self.leading > (n := self.measured.size(trainer)):
            raise ValueError(
                f"leading={self.leading} eigenvalues, but the training set has {n} samples: ask for fewer."
            )

    def kernel_need(self, trainer: Trainer, step: int, moved: bool, ended: bool) -> KernelNeed | None:
        """Need K^t of the probe set at the steps of the schedule."""
        if not self.due(step, moved, ended):
            return None
        return KernelNeed(min(self.probe_size, self.measured.size(trainer)), False, self.memory)

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Extract K^t on the probe set and take its measures."""
        extraction = shared_extraction(trainer).extract(trainer, pl_module, self, step)
        problem = extraction.problem
        # a corner of the shared Gram, copied: the callback keeps it until the next step
        gram, y = problem.gram[: self.probe_size, : self.probe_size].clone(), problem.targets[: self.probe_size]
        initial = self._initial.to(gram) if self.rows and self._initial is not None else gram
        row: dict[str, Any] = {
            "step": step,
            "alignment_with_initial": centered_kernel_alignment(gram, initial),
            "target_alignment": kernel_target_alignment(gram, y),
            "distance_to_initial": kernel_distance(gram, initial),
            "velocity": None,
            "effective_rank": effective_rank(gram),
            "target_share": target_share(gram, y, self.leading),
        }
        if self.rows and self._previous is not None:
            row["velocity"] = kernel_velocity(self._previous.to(gram), gram, step - self.rows[-1]["step"])
        row |= _decays(gram, y)
        for i, eigenvalue in enumerate(leading_eigenvalues(gram, self.leading).tolist(), 1):
            row[f"eigenvalue_{i}"] = eigenvalue
        self.rows.append(row)
        self._initial, self._previous = initial, gram
        group = self.named("kernel")
        metrics = {f"{group}/{name}": value for name, value in row.items() if name != "step" and value is not None}
        log_metrics(trainer, metrics, step)
        if self.per_layer:
            self._measure_layers(trainer, extraction, step)

    def _measure_layers(self, trainer: Trainer, extraction: Extraction, step: int) -> None:
        """Take the measures of every layer's kernel."""
        if step == 0:
            self.layers = []
        probe = extraction.train.take(slice(self.probe_size))
        kernels = extraction.kernel.per_layer(probe.x)
        trace = sum(float(kernel.trace()) for kernel in kernels.values())
        for layer, kernel in kernels.items():
            share = float(kernel.trace()) / trace if trace else float("nan")
            alignment = kernel_target_alignment(kernel, probe.y)
            row = {"step": step, "layer": layer, "trace_share": share, "target_alignment": alignment}
            self.layers.append(row)
            group = f"{self.named('kernel_layers')}/{layer or 'itself'}"
            log_metrics(trainer, {f"{group}/trace_share": share, f"{group}/target_alignment": alignment}, step)

    def finish(self, trainer: Trainer) -> None:
        """Keep the table and the figure."""
        log_table(trainer, self.named(self.table), self.rows)
        log_figure(trainer, self.named(self.table), draw_diagnostics(self.rows))
        if self.layers:
            log_table(trainer, self.named("kernel_layers"), self.layers)
            log_figure(trainer, self.named("kernel_layers"), draw_layers(self.layers))

    def state_dict(self) -> dict[str, Any]:
        """Return the rows and the two kernels that later ones are compared with, for the checkpoint."""
        kernels = {"initial": self._initial, "previous": self._previous}
        return {**super().state_dict(), **kernels, "layers": self.layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows and kernels of a checkpoint."""
        super().load_state_dict(state_dict)
        self._initial, self._previous = state_dict["initial"], state_dict["previous"]
        self.layers = state_dict.get("layers", [])


def _decays(gram: Tensor, y: Tensor) -> dict[str, float | None]:
    """Exponents of the spectrum and of the targets with the ends of their intervals; None where there are none."""
    decays = decay_exponents(gram[:_DECAY_SAMPLES, :_DECAY_SAMPLES], y[:_DECAY_SAMPLES])
    columns: dict[str, float | None] = {}
    for name, decay in zip(("spectrum", "target"), decays or (None, None), strict=True):
        values = (None,) * 3 if decay is None else (decay.exponent, *decay.interval)
        columns |= dict(zip((f"{name}_exponent", f"{name}_exponent_low", f"{name}_exponent_high"), values, strict=True))
    return columns
