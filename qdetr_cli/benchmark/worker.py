"""One candidate in a process of its own: it loads, then runs as often as it is told, and says what that took.

    python -m qdetr_cli.benchmark.worker '{"runtime": "openvino", "path": "model.xml", ...}'

Lines in: a number of runs, or nothing more to end. Lines out: JSON. A file's process imports its runtime and
numpy, no torch, so that its memory is the runtime's. Everything that a library prints goes to stderr.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdetr_cli.errors import ExportError, QDetrError

Run = Callable[[], object]
MEGA = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is to run, as JSON on its command line."""

    runtime: str
    path: str
    threads: int
    batch: int
    size: tuple[int, int]  # (H, W)
    original: dict[str, Any]  # what a .pth does not say of itself
    plugins: tuple[str, ...]

    def to_json(self) -> str:
        """As the command line has it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The inverse of `to_json`."""
        content = json.loads(text)
        return cls(**content | {"size": tuple(content["size"]), "plugins": tuple(content["plugins"])})


def main() -> int:
    """Load, answer until stdin ends, and say how much memory it took; 2 where the candidate cannot run."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job.from_json(sys.argv[1])
    try:
        load = _torch_model if job.runtime == "torch" else _session
        run, told = load(job)
        answers.write(json.dumps(told) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(_timed(_named(run, job), int(line))) + "\n")
    except QDetrError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    answers.write(json.dumps({"peak_memory_mb": peak_memory()}) + "\n")
    return 0


def peak_memory() -> float:
    """The most memory that this process ever held, in MB.

    Not `ru_maxrss` where the kernel says it better: that one remembers the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 / MEGA for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGA


def _named(run: Run, job: Job) -> Run:
    """`run`, whose errors, of whatever type its runtime has, are one line that names the file."""

    def named() -> object:
        try:
            return run()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            shape = f"{job.batch} x {job.size[0]}x{job.size[1]}"
            raise ExportError(f"{job.path}: cannot run at {shape}: {reason}") from error

    return named


def _timed(run: Run, times: int) -> dict[str, list[float]]:
    """Seconds of each run: on the clock, and of all cores together."""
    wall, cpu = [], []
    for _ in range(times):
        began, used = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return {"wall": wall, "cpu": cpu}


def _session(job: Job) -> tuple[Run, dict[str, Any]]:
    import numpy as np

    from qdetr_cli.sessions import TITLES, open_session, package, runtime_of

    path = Path(job.path)
    version = package(runtime_of(path), TITLES[job.runtime]).__version__
    before, began = peak_memory(), time.perf_counter()
    session = open_session(path, job.threads)
    told = {"version": version, "memory_before_mb": before, "load_seconds": time.perf_counter() - began}
    pixels = np.random.default_rng(0).standard_normal((job.batch, 3, *job.size), dtype=np.float32)
    return lambda: session.run(pixels), told


def _torch_model(job: Job) -> tuple[Run, dict[str, Any]]:
    """The float model: of a fake-quant checkpoint the same weights with every quantizer off."""
    import torch

    from qdetr_cli import plugins
    from qdetr_cli.models import Source, open_model
    from qdetr_cli.original import Settings
    from qdetr_cli.rewrite import set_enabled

    torch.set_num_threads(job.threads)
    plugins.load([Path(each) for each in job.plugins])
    before, began = peak_memory(), time.perf_counter()
    model = open_model(Source(job.path, Settings(**job.original)), lambda text: None)  # type: ignore[typeddict-item]
    if model.plan is not None:
        set_enabled(model.module, None, False)
    module = model.module.eval()
    told = {"version": torch.__version__, "memory_before_mb": before}
    told["load_seconds"] = time.perf_counter() - began
    pixels = torch.randn(job.batch, 3, *job.size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(job.batch, *job.size, dtype=torch.int64)

    def run() -> None:
        with torch.inference_mode():
            module(pixel_values=pixels, pixel_mask=mask)

    return run, told


if __name__ == "__main__":
    sys.exit(main())
