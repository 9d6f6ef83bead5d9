"""What importing the package costs beside importing Lightning alone.

Every round starts one new interpreter for each import, in an order that turns every round. Both the time on the clock
and the processor time are kept: on a machine that does other work too, the second is the steadier one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine

IMPORTS = {
    "lightning": "import lightning",
    "ntk_lightning": "import ntk_lightning",
    "FiniteNetwork": "from ntk_lightning.modules import FiniteNetwork",
    "callbacks": "import ntk_lightning.callbacks",
    "lightning's CLI": "import lightning.pytorch.cli",
    "cli": "import ntk_lightning.cli",
}
PEERS = {"ntk_lightning": "lightning", "FiniteNetwork": "lightning", "callbacks": "lightning", "cli": "lightning's CLI"}
RESULTS = Path(__file__).parent / "results" / "import_time.json"


def measure(statement: str) -> tuple[float, float]:
    """Seconds on the clock and of the processor that a new interpreter takes for a statement."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment, stderr=subprocess.DEVNULL)
    after, end = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return end - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    for number in range(options.rounds + 1):
        for name in list(IMPORTS)[:: 1 if number % 2 else -1]:
            seconds = measure(IMPORTS[name])
            if number:  # the first round fills the disk cache and writes bytecode
                taken[name].append(seconds)
    wall, processor = (
        {name: statistics.median(pair[part] for pair in pairs) for name, pairs in taken.items()} for part in (0, 1)
    )
    ratios = {
        name: {"peer": peer, "wall": wall[name] / wall[peer], "processor": processor[name] / processor[peer]}
        for name, peer in PEERS.items()
    }
    for name, statement in IMPORTS.items():
        print(f"{statement:50s} {wall[name]:6.2f} s, processor {processor[name]:6.2f} s", end="")
        print(f", {ratios[name]['processor']:.3f} times {PEERS[name]}" if name in PEERS else "")
    record = {
        "machine": machine(),
        "rounds": options.rounds,
        "statements": IMPORTS,
        "median_seconds": {"wall": wall, "processor": processor},
        "ratios": ratios,
        "all_seconds": {name: [[round(value, 4) for value in pair] for pair in pairs] for name, pairs in taken.items()},
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
