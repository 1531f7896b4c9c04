"""How fast exported files are beside the float file and other tools' 8-bit files, in one race; ratios.

    python -m benchmarks.export_speed --files FOLDER --build                         (all files, takes long)
    python -m benchmarks.export_speed --files FOLDER --model detr_r50 --runtime both --threads 2

Random weights, one image of 640x640. Each file has a process of its own, loaded as `qdetr benchmark` loads it
(float parts in OpenVINO as float32), and the processes take turns, so that whatever else the machine does
meets all alike. Times are medians; a ratio is the median over the turns. Races are added to
benchmarks/results/export_speed.json, and the newest of each kind make the table beside it.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.detectors import MODELS
from benchmarks.export_files import FLOAT, Raced, raced
from benchmarks.ledger import commit
from qdetr_cli.benchmark.machine import machine
from qdetr_cli.benchmark.turns import Candidate, measured
from qdetr_cli.benchmark.worker import Job

RESULTS = Path(__file__).parent / "results" / "export_speed.json"
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
UNITS = {"amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI"}  # the best first
PACKAGES = ("onnxruntime", "openvino", "nncf", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One file in a race: seconds on the clock and of all cores; by both how many times as fast as float."""

    name: str
    seconds: float
    p90: float
    processor_seconds: float
    speedup: float
    processor_speedup: float  # says more where others use the machine
    peak_megabytes: float
    megabytes: float
    integer: dict[str, tuple[int, int]]


def main() -> None:
    """Make what is missing; without --build race it, and write the table."""
    arguments = _arguments()
    runtimes = list(RUNTIMES) if arguments.runtime == "both" else [arguments.runtime]
    for model in arguments.model or MODELS:
        files = raced(model, runtimes, arguments.side, arguments.files)
        for runtime in [] if arguments.build else runtimes:
            own = [(card, path) for card, path in files if card.runtime == runtime]
            for threads in arguments.threads:
                began = machine()
                rows = race(own, arguments.side, threads, arguments.runs)
                found = {"model": model, "runtime": runtime, "threads": threads, "side": arguments.side}
                _add(arguments.results, {**found, **_facts(began), "rows": [asdict(row) for row in rows]})
                _show(found, rows)
    if not arguments.build:
        write_table(arguments.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder where the files are kept")
    parser.add_argument("--build", action="store_true", help="make the files only")
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--runtime", choices=(*RUNTIMES, "both"), default="both")
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def race(files: Sequence[tuple[Raced, Path]], side: int, threads: int, runs: int) -> list[Row]:
    """The rows of files of one runtime, in turns."""
    timings = measured([_candidate(card, path, side, threads) for card, path in files], runs=runs)
    reference = next(each for each in timings if each.candidate.name == FLOAT)
    return [
        Row(
            name=card.name,
            seconds=timing.median,
            p90=timing.p90,
            processor_seconds=timing.cpu_median,
            speedup=timing.speedup(reference),
            processor_speedup=reference.cpu_median / timing.cpu_median,
            peak_megabytes=timing.peak_memory_mb,
            megabytes=card.megabytes,
            integer=card.integer,
        )
        for (card, _), timing in zip(files, timings, strict=True)
    ]


def _candidate(card: Raced, path: Path, side: int, threads: int) -> Candidate:
    job = Job(
        runtime=card.runtime,
        path=str(path.resolve()),
        threads=threads,
        batch=1,
        size=(side, side),
        original={},
        plugins=(),
    )
    return Candidate(
        name=card.name,
        job=job,
        quantized=card.name != FLOAT,
        size_bytes=round(1e6 * card.megabytes),
        origin=card.file,
        family="",
    )


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    when = datetime.now(UTC).isoformat(timespec="minutes")
    return {"when": when, "commit": commit(), "machine": found, "versions": versions}


def _add(results: Path, race: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    races = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    results.write_text(json.dumps([*races, race], indent=1) + "\n", encoding="utf-8")


def _show(found: dict[str, Any], rows: Sequence[Row]) -> None:
    print(f"{found['model']} in {RUNTIMES[found['runtime']]}, {found['threads']} threads", flush=True)
    for row in rows:
        clock = f"{1000 * row.seconds:8.1f} ms {row.speedup:5.2f} x float"
        cores = f"{1000 * row.processor_seconds:8.1f} ms {row.processor_speedup:5.2f} x of all cores"
        print(f"  {row.name:36} {clock} {cores}  {row.integer}", flush=True)


def write_table(results: Path) -> None:
    """Write `<results>.md`: of each kind of race the newest."""
    races = json.loads(results.read_text(encoding="utf-8"))
    tables = (
        _table(*kind, {each["model"]: each for each in races if _kind(each) == kind})
        for kind in sorted({_kind(each) for each in races})
    )
    results.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")


def _kind(race: dict[str, Any]) -> tuple[str, int, str]:
    """The runtime, the threads, and what multiplies integers in that processor."""
    known = race["machine"]["instructions"]
    units = (text for name, text in UNITS.items() if name in known)
    return race["runtime"], race["threads"], next(units, "without VNNI")


def _table(runtime: str, threads: int, unit: str, races: dict[str, Any]) -> str:
    """Milliseconds, and in parentheses how many times as fast as float."""
    rows = {model: {row["name"]: row for row in race["rows"]} for model, race in races.items()}
    names = list(dict.fromkeys(name for named in rows.values() for name in named))
    title = f"{RUNTIMES[runtime]}, {threads} thread{'s' if threads > 1 else ''}, {unit}"
    lines = [f"| {title} | {' | '.join(rows)} |", "| --- " * (len(rows) + 1) + "|"]
    for name in names:
        cells = [_cell(named[name]) if name in named else "" for named in rows.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any]) -> str:
    return f"{1000 * row['seconds']:.0f} ms ({row['speedup']:.2f} x)"


if __name__ == "__main__":
    main()
