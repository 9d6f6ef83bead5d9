"""Soak: fits, studies and stores under random kills, signals, full disks and slow files, for as long as asked.

python tests/soak.py --minutes 20 --seed 0

Every round takes a tiny task and starts it again and again, in forked children that are killed or stopped at random
moments, whose disk is full from some moment on, whose files are slow, and of which sometimes two work at once, until
one ends by itself. After every attempt what was finished must be there untouched, an error must be one that says what
to do, and at the end all results must have the bits of an undisturbed run. The exit status is 1 if anything was lost or
wrong; its folder is kept then. Linux only.

Longer than 300 lines, since the rounds, their faults and the counting of what was lost share one state.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_tasks import PACKAGE, Task, damage_finished, damage_result, store_blocks, study_cells, tasks, undisturbed

COUNTS = (
    "rounds",
    "attempts",
    "kills",
    "signals",
    "resumes",
    "faults",
    "pairs",
    "fits",
    "cells",
    "blocks",
    "lost",
    "wrong",
)
CLEAR, UNCLEAR, INTERRUPTED = 20, 21, 22  # exit statuses of a child
HANGS = 300.0  # seconds that no attempt takes


def disturb(chance: random.Random, slow: float, full_after: int | None) -> None:
    """Make the calls that finish files slow, up to so many seconds each, or fail from one of them on."""
    calls = itertools.count()

    def disturbed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's
            if full_after is not None and next(calls) >= full_after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            time.sleep(slow * chance.random())
            returned = function(*args, **kwargs)
            time.sleep(slow * chance.random())
            return returned

        return call

    for name in ("fsync", "replace", "rename", "link", "mkdir"):
        setattr(os, name, disturbed(getattr(os, name)))


def start(task: Task, folder: Path, chance: random.Random, slow: float = 0.0, full_after: int | None = None) -> int:
    """Fork a child that does a task; its errors go to a file in the folder."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # or one could end the child's copy of this function
    child = os.fork()
    if child == 0:
        status = UNCLEAR
        try:
            for descriptor in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            tempfile.tempdir = str(folder)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            if slow or full_after is not None:
                disturb(chance, slow, full_after)
            task.run(folder)
            status = 0
        except (SystemExit, KeyboardInterrupt):
            status = INTERRUPTED
        except BaseException as error:  # whatever it is, it is judged
            undisturbed()
            message = importlib.import_module(f"{PACKAGE}.__main__").explain(error)
            status = UNCLEAR if message is None else CLEAR
            (folder / f"error-{os.getpid()}.txt").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return child


@dataclass
class Child:
    """One attempt, and what is to befall it when (seconds after its start; infinity for never)."""

    pid: int
    killed_at: float
    signal: int
    full_at: float
    limit: int  # bytes that a file can have on its full disk
    faulty: bool  # its disk gets full in either way
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False
    hung: bool = False
    status: int | None = None

    def look(self) -> None:
        """Do to it what is due."""
        age = time.monotonic() - self.started
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
        elif age > HANGS:
            os.kill(self.pid, signal.SIGKILL)
            self.hung = True
        elif age > self.killed_at and not self.stopped:
            os.kill(self.pid, self.signal)
            self.stopped = True
        elif age > self.full_at:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
            self.full_at = float("inf")

    def problem(self) -> str | None:
        """Say what is wrong with its end."""
        if self.hung:
            return f"child {self.pid} did not end in {HANGS:g} seconds"
        if self.status == UNCLEAR or (self.status == CLEAR and not self.faulty):
            return f"child {self.pid} ended in an error that says nothing to do: see error-{self.pid}.txt"
        if self.status in (0, CLEAR) or self.stopped:
            return None
        return f"child {self.pid}, left alone, ended with status {self.status}"


class Soak:
    """The rounds, and what they found."""

    def __init__(self, folder: Path, seed: int, damage: str | None) -> None:
        self.folder, self.damage, self.chance = folder, damage, random.Random(seed)
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self.problems: list[str] = []
        self.kinds = {kind: Counter(dict.fromkeys(COUNTS, 0)) for kind in tasks()}
        self.expected: dict[str, tuple[dict[str, Any], float]] = {}

    def reference(self, task: Task) -> tuple[dict[str, Any], float]:
        """Run a task undisturbed, when it is first met: its results and seconds."""
        if task.name not in self.expected:
            folder = self.folder / f"reference-{task.kind}-{task.name}"
            folder.mkdir()
            task.prepare(folder)
            started = time.monotonic()
            if os.waitpid(start(task, folder, self.chance), 0)[1]:
                raise RuntimeError(f"{task.kind} {task.name} fails undisturbed: see {folder}/error-*.txt")
            self.expected[task.name] = task.results(folder), time.monotonic() - started
        return self.expected[task.name]

    def child(self, task: Task, folder: Path, attempts: int) -> Child:
        """Start an attempt with what chance has in store for it."""
        chance, seconds, calm = self.chance, self.reference(task)[1], attempts > 40  # at last it may end
        killed = not calm and (attempts == 1 or chance.random() < 0.75)
        slow = 0.03 if chance.random() < 0.4 else 0.0
        full = None if calm else chance.choice(["limit", "call", None, None, None, None])
        pid = start(
            task, folder, random.Random(chance.random()), slow, chance.randrange(60) if full == "call" else None
        )
        return Child(
            pid,
            killed_at=seconds * chance.random() * (0.8 if attempts == 1 else 0.6) if killed else float("inf"),
            signal=chance.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]) if killed else signal.SIGKILL,
            full_at=seconds * max(0.0, chance.uniform(-0.5, 1)) if full == "limit" else float("inf"),
            limit=int(10 ** chance.uniform(0, 5)),
            faulty=full is not None,
        )

    def attempt(self, task: Task, folder: Path, seen: dict[str, Any], attempts: int) -> bool:
        """Run one child or two until they end, watching what is finished; True where one ended by itself."""
        self.counts["resumes"] += bool(seen)
        pair = task.kind != "fit" and self.chance.random() < 0.3
        self.counts["pairs"] += pair
        children = [self.child(task, folder, attempts) for _ in range(1 + pair)]
        try:
            while any(child.status is None for child in children):
                time.sleep(0.02)
                for child in children:
                    if child.status is None:
                        child.look()
                if task.kind != "fit":
                    self.compare_finished(task, folder, seen)
        finally:
            for child in children:
                if child.status is None:
                    os.kill(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)
        self.compare_finished(task, folder, seen)
        for child in children:
            self.counts["attempts"] += 1
            if child.stopped and child.status != 0:
                self.counts["kills" if child.signal == signal.SIGKILL else "signals"] += 1
            self.counts["faults"] += child.status == CLEAR
            if problem := child.problem():
                self.found("wrong", folder, problem)
        return any(child.status == 0 for child in children)

    def compare_finished(self, task: Task, folder: Path, seen: dict[str, Any]) -> None:
        """Find what was finished before and is not now, or is written anew."""
        now = task.finished(folder)
        if task.kind == "fit":  # a fit has no checkpoint any more when all its tables are there
            tables = {name: content for name, content in self.reference(task)[0].items() if name != "weights"}
            complete = tables.items() <= task.results(folder).items()
            lost = [f"step {seen['step']}"] if seen and not complete and now.get("step", 0) < seen["step"] else []
        else:
            lost = [name for name, stamp in seen.items() if now.get(name) != stamp]
        for name in lost:
            self.found("lost", folder, f"{name} was finished and is " + ("written anew" if name in now else "gone"))
        seen.clear()
        seen.update(now)

    def found(self, what: str, folder: Path, text: str) -> None:
        self.counts[what] += 1
        self.problems.append(f"{what}: {folder}: {text}")
        print(self.problems[-1], flush=True)

    def round(self, task: Task) -> None:
        """Run a task to its end, and compare it with the undisturbed run."""
        expected, seconds = self.reference(task)
        number, before = self.counts["rounds"], len(self.problems)
        folder = self.folder / f"{number:05d}-{task.kind}-{task.name}"
        folder.mkdir()
        task.prepare(folder)
        seen: dict[str, Any] = {}
        started = self.counts.copy()
        attempts = 1
        while not self.attempt(task, folder, seen, attempts):
            attempts += 1
            if seen and self.damage == "lost":
                damage_finished(task, folder)
        if self.damage == "lost" and len(self.problems) == before:
            damage_finished(task, folder)
        elif self.damage == "wrong":
            damage_result(task, folder)
        found = task.results(folder)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                self.found("lost", folder, f"{name} is missing")
            elif name not in expected or found[name] != expected[name]:
                self.found("wrong", folder, f"{name} differs from the undisturbed run's")
        self.counts["rounds"] += 1
        self.counts["fits"] += task.kind == "fit"
        self.counts["cells"] += len(study_cells(folder))
        self.counts["blocks"] += len(store_blocks(folder))
        events = ", ".join(
            f"{self.counts[k] - started[k]} {k}" for k in ("kills", "signals", "resumes", "faults", "pairs")
        )
        print(f"round {number}: {task.kind} {task.name} ({seconds:.1f} s): {attempts} attempts, {events}", flush=True)
        self.kinds[task.kind].update({name: self.counts[name] - started[name] for name in COUNTS})
        if len(self.problems) == before:
            shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no round after this time")
    parser.add_argument("--rounds", type=int, help="begin no more rounds than this")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the disturbances, whose moments the system's clock moves"
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--tasks", nargs="+", choices=("fit", "study", "store"), default=("fit", "study", "store"))
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--damage", choices=("lost", "wrong"), help="lose or change results, to see that it is noticed")
    options = parser.parse_args()
    os.environ.update({f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")})
    for name in ("cli", "__main__", "studies.study", "kernels.grams.store", "callbacks", "modules", "datamodules"):
        importlib.import_module(f"{PACKAGE}.{name}")
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=options.folder)).resolve()
    soak, started, every = Soak(folder, options.seed, options.damage), time.monotonic(), tasks()
    for number in itertools.count():
        if time.monotonic() - started > 60 * options.minutes or number == options.rounds or len(soak.problems) > 20:
            break
        group = every[options.tasks[number % len(options.tasks)]]
        soak.round(group[number // len(options.tasks) % len(group)])
    if options.json is not None:
        seconds = round(time.monotonic() - started, 1)
        options.json.write_text(json.dumps({"seed": options.seed, "seconds": seconds, **soak.counts}, indent=1) + "\n")
    if soak.problems:
        print(f"\nKept in {folder}:", *soak.problems, sep="\n")
    else:
        shutil.rmtree(folder)
    print("\n      ", *(f"{name:>9}" for name in COUNTS))
    for kind, counts in soak.kinds.items():
        print(f"{kind:7}", *(f"{counts[name]:9}" for name in COUNTS))
    print(" ".join(f"{name}={soak.counts[name]}" for name in COUNTS))
    return int(bool(soak.problems))


if __name__ == "__main__":
    sys.exit(main())
