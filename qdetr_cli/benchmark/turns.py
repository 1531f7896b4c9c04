"""Candidates that take turns: timings that drift with the machine drift for all of them alike."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from qdetr_cli.benchmark.worker import Job
from qdetr_cli.errors import ExportError

WARM_UP = 2  # runs before anything is counted
COLD, COLD_SECONDS = 1, 0.05  # at the start of a turn, not counted: the others have emptied the caches
TURN, TURN_SECONDS = 3, 0.15  # counted runs of a turn; more where they are shorter together
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model or file to measure."""

    name: str
    job: Job
    quantized: bool
    size_bytes: int  # on disk, all of its files
    origin: str  # the MODEL or FILE that it stands for
    family: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What was measured of a candidate. Seconds on the clock and of all cores, one list for each turn."""

    candidate: Candidate
    version: str  # of the runtime
    load_seconds: float
    memory_before_mb: float  # the runtime imported, nothing loaded
    peak_memory_mb: float
    wall: tuple[tuple[float, ...], ...]
    cpu: tuple[tuple[float, ...], ...]

    @property
    def runs(self) -> int:
        """How many runs were counted."""
        return len(self._flat)

    @property
    def median(self) -> float:
        """The median latency in seconds."""
        return statistics.median(self._flat)

    @property
    def p90(self) -> float:
        """The latency that one run of ten passes, in seconds."""
        return float(np.quantile(self._flat, 0.9))

    @property
    def cpu_median(self) -> float:
        """The median time of all cores together, in seconds."""
        return statistics.median(seconds for turn in self.cpu for seconds in turn)

    @property
    def images_per_second(self) -> float:
        """At the median latency, one batch after another."""
        return self.candidate.job.batch / self.median

    def speedup(self, other: "Timing") -> float:
        """How many times faster than `other`: the median of the ratios of neighbouring turns."""
        pairs = zip(self.wall, other.wall, strict=True)
        return statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)

    @property
    def _flat(self) -> list[float]:
        return [seconds for turn in self.wall for seconds in turn]


def measured(
    candidates: Sequence[Candidate], *, runs: int, advance: Advance = lambda done: None
) -> tuple[Timing, ...]:
    """Timings of all candidates, at least `runs` of each, in turns of a few runs whose order rotates.

    Raises ExportError where one cannot be loaded or run.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(each)) for each in candidates]
        for each in workers:
            each.warm_up()
        for turn in range(-(-runs // TURN)):
            first = turn % len(workers)
            for each in (*workers[first:], *workers[:first]):
                each.take_turn()
                advance(1)
        return tuple(each.end() for each in workers)


@dataclass(slots=True, kw_only=True)
class Worker:
    """The process of a candidate."""

    candidate: Candidate
    process: "subprocess.Popen[str]"
    complaints: IO[str]  # what it writes to stderr
    told: dict[str, Any] = field(default_factory=dict)
    cold: int = COLD
    turn: int = TURN
    wall: list[tuple[float, ...]] = field(default_factory=list)
    cpu: list[tuple[float, ...]] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run a little, and see how many runs make a turn."""
        pace = min(self.run(WARM_UP)["wall"])
        self.cold = max(COLD, math.ceil(COLD_SECONDS / pace))
        self.turn = max(TURN, math.ceil(TURN_SECONDS / pace))

    def run(self, times: int) -> dict[str, Any]:
        """Seconds of that many runs."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{times}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self.answer()

    def take_turn(self) -> None:
        """A turn, of which the first runs are not counted."""
        taken = self.run(self.cold + self.turn)
        self.wall.append(tuple(taken["wall"][self.cold :]))
        self.cpu.append(tuple(taken["cpu"][self.cold :]))

    def end(self) -> Timing:
        """All that was measured; the process ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self.answer()["peak_memory_mb"]
        return Timing(
            candidate=self.candidate,
            peak_memory_mb=peak,
            wall=tuple(self.wall),
            cpu=tuple(self.cpu),
            **self.told,
        )

    def answer(self) -> dict[str, Any]:
        """The next line of the process. Raises ExportError where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._failure()
        content: dict[str, Any] = json.loads(line)
        return content

    def _failure(self) -> ExportError:
        code = self.process.wait()
        self.complaints.seek(0)
        lines = [line for line in self.complaints.read().splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if errors:
            return ExportError(errors[-1])
        reason = "it ran out of memory, or was killed" if code == -9 else (lines or [f"exit code {code}"])[-1]
        return ExportError(f"{self.candidate.name}: could not be measured: {reason}")


@contextmanager
def worker(candidate: Candidate) -> Iterator[Worker]:
    """The process of a candidate, loaded and ready; it is gone after the block, whatever happens."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(candidate.job.threads))
    command = [sys.executable, "-m", "qdetr_cli.benchmark.worker", candidate.job.to_json()]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=complaints, text=True, env=environment
        )
        try:
            started = Worker(candidate=candidate, process=process, complaints=complaints)
            started.told = started.answer()
            yield started
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None is not process.stdout
            process.stdout.close()
            with suppress(BrokenPipeError):  # what it was told last may not have reached it
                process.stdin.close()
