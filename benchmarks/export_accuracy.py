"""AP of exported 8-bit files beside ONNX Runtime's and NNCF's own quantization of the same float model.

    python -m benchmarks.export_accuracy runs/export --models conditional_detr d_fine --seeds 0 1 2
    python -m benchmarks.export_accuracy runs/export --models --qat 4-4-8=RUN/last

Each seed draws 256 calibration images from the training split, the same for all; every file is then run in
its own runtime on the evaluation split, as `qdetr eval` does. `--qat` adds fine-tuned checkpoints.
Lines go to benchmarks/results/export_accuracy.csv, and a table beside it; what is there is not run again.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import onnx
import torch

from benchmarks.ablation import TRAIN_IMAGES, VAL_IMAGES
from benchmarks.ledger import Ledger, commit
from benchmarks.peers import PEERS, Feed
from qdetr_cli import pipeline, report
from qdetr_cli.artefact import open_artefact, padded
from qdetr_cli.calibrate import chosen
from qdetr_cli.data import DetectionData, ImageSet, Processor, Sample, collate
from qdetr_cli.demo import embedded
from qdetr_cli.evaluate import detect_all
from qdetr_cli.export.onnx_graph import marked, with_pairs
from qdetr_cli.export.program import exported
from qdetr_cli.exporting import export_size, metadata_of, write
from qdetr_cli.metrics import Metrics, measure
from qdetr_cli.models import Model, Source, open_model, trace_size
from qdetr_cli.recipe import Calibrate
from qdetr_cli.results import DataSource
from qdetr_cli.running import bench_of
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.sessions import KEY
from qdetr_cli.splits import open_split

RESULTS = Path(__file__).parent / "results" / "export_accuracy.csv"
COLUMNS = ("model", "file", "runtime", "seed", "ap", "ap50_voc_area", "megabytes", "seconds", "commit")
RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}
TARGETS = {".onnx": "onnx", ".xml": "openvino"}
OURS, FINE_TUNED = "qdetr w8a8", "qdetr fine-tuned"
IMAGES = 256  # for calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What holds for every file."""

    runs: Path
    data: DataSource
    results: Ledger
    threads: int
    page: report.Page


def main() -> None:
    """Measure what is asked for and not measured yet, then write the table."""
    arguments = _arguments()
    scenes = arguments.runs / "scenes"
    if not scenes.exists():
        write_scenes(scenes, train=TRAIN_IMAGES, val=VAL_IMAGES)
    setting = Setting(
        runs=arguments.runs,
        data=DataSource(scenes / "voc"),
        results=Ledger(path=arguments.results, columns=COLUMNS, keys=4),
        threads=arguments.threads,
        page=report.Page(json=True),
    )
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        for model in arguments.models:
            _float(model, setting)
            _ours(model, seed, setting)
            _theirs(model, seed, arguments.peers, setting)
    for name, _, folder in (each.partition("=") for each in arguments.qat):
        _fine_tuned(name, Source(folder), setting)
    write_table(setting.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the files, and of the scenes")
    parser.add_argument("--models", nargs="*", default=["conditional_detr", "d_fine"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--qat", nargs="+", default=[], metavar="NAME=FOLDER", help="fine-tuned checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _float(model: str, setting: Setting) -> None:
    """The float model in both runtimes, which all others are made of or compared with."""
    plain = float_file(model, setting.runs)
    _line(model, "float", "", plain, lambda: None, setting)
    path = plain.with_suffix(".xml")
    _line(model, "float", "", path, partial(_export, embedded(model), path), setting)


def float_file(model: str, runs: Path) -> Path:
    """The embedded detector as plain ONNX, with what qdetr says of it, before any pass for a runtime."""
    path = runs / model / "float.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open_model(embedded(model), print)
        size = trace_size(opened)
        file = with_pairs(marked(exported(opened.module.eval(), size, batch=1)))
        onnx.helper.set_model_props(file, {KEY: metadata_of(opened, size, quantized=False).to_json()})
        onnx.save(file, path)
    return path


def _ours(model: str, seed: int, setting: Setting) -> None:
    """The shipped recipe, calibrated and exported as a user would."""
    folder = setting.runs / model / str(seed)
    for suffix in RUNTIMES:
        path = folder / f"w8a8{suffix}"
        _line(model, OURS, str(seed), path, partial(_calibrated, model, seed, path, setting), setting)


def _calibrated(model: str, seed: int, path: Path, setting: Setting) -> None:
    checkpoint = path.parent / "w8a8"
    if not checkpoint.exists():
        pipeline.quantize(
            embedded(model),
            recipe="w8a8",
            data=setting.data,
            out=checkpoint,
            overrides=(f"calibrate.images={IMAGES}", "calibrate.batch_size=32", f"calibrate.seed={seed}"),
            measured=False,
            listener=setting.page,
        )
    _export(Source(str(checkpoint)), path)


def _export(source: Source, path: Path) -> None:
    """What `qdetr export` writes, without its comparison of file and model."""
    model = open_model(source, print)
    write(model, TARGETS[path.suffix], export_size(model, None), path)


def _theirs(model: str, seed: int, names: Sequence[str], setting: Setting) -> None:
    """The peers' files of the float file, on the same images."""
    for name in names:
        path = setting.runs / model / str(seed) / f"{name}{PEERS[name].suffix}"
        plain = float_file(model, setting.runs)
        _line(model, name, str(seed), path, partial(_quantized, name, plain, seed, path, setting), setting)


def _quantized(name: str, plain: Path, seed: int, path: Path, setting: Setting) -> None:
    PEERS[name].write(plain, calibration(plain, seed, setting), path)


@cache
def calibration(plain: Path, seed: int, setting: Setting) -> list[Feed]:
    """The inputs of the float file for the images that `calibrate` draws with this seed, in its order."""
    artefact = open_artefact(plain, threads=1)
    split = open_split(setting.data, setting.data.train, setting.page)
    images = ImageSet(split, artefact.detector.processor, range(len(split.class_names)))
    inputs = artefact.session.inputs
    feeds: list[Feed] = []
    for index in chosen(len(images), Calibrate(images=IMAGES, seed=seed)):
        batch = collate([images[index]])
        pixels = padded(batch.pixel_values, inputs.size).numpy()
        feeds.append(inputs.feed(pixels, padded(batch.pixel_mask, inputs.size).numpy()))
    return feeds


def _fine_tuned(name: str, source: Source, setting: Setting) -> None:
    """A checkpoint of the model of its family, in both runtimes."""
    model = open_model(source, print).family.name
    for suffix in RUNTIMES:
        path = setting.runs / model / f"{name}{suffix}"
        _line(model, f"{FINE_TUNED} {name}", "", path, partial(_export, source, path), setting)


def _line(model: str, name: str, seed: str, path: Path, write: Callable[[], None], setting: Setting) -> None:
    """Make a file, measure it, and add its line, unless it is there."""
    runtime = RUNTIMES[path.suffix]
    key = (model, name, runtime, seed)
    if setting.results.has(key):
        return
    began = time.perf_counter()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    taken = time.perf_counter() - began
    metrics = measured(path, setting)
    parts = [each for each in (path, path.with_suffix(".bin")) if each.exists()]
    size = sum(each.stat().st_size for each in parts) / 1e6
    row = [*key, round(metrics.ap, 4), round(metrics.ap50_voc_area, 4), round(size, 2), round(taken)]
    print(*row, flush=True)
    setting.results.add([*row, commit()])


def measured(path: Path, setting: Setting) -> Metrics:
    """AP of a file in its runtime: what `running.evaluate` does, on images that are prepared only once."""
    detector = open_artefact(path, setting.threads).detector
    bench = bench_of(Model(detector=detector), _split(setting))
    kept = _prepared(detector.processor, bench.class_index, setting)
    found = detect_all(
        detector.model, detector.family, replace(bench, images=kept), device=torch.device("cpu")
    )
    return measure(bench.data, found)


class Kept(ImageSet):
    """The images of a split, each prepared once."""

    def __getitem__(self, index: int) -> Sample:
        if index not in self._samples:
            self._samples[index] = super().__getitem__(index)
        return self._samples[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        return [self[index] for index in indices]

    @cached_property
    def _samples(self) -> dict[int, Sample]:
        return {}


@cache
def _prepared(processor: Processor, class_index: tuple[int, ...], setting: Setting) -> Kept:
    return Kept(_split(setting), processor, class_index)


@cache
def _split(setting: Setting) -> DetectionData:
    return open_split(setting.data, setting.data.split, setting.page)


def write_table(results: Ledger) -> None:
    """Write `<results>.md`: AP of each file, in points, mean and standard deviation over the seeds."""
    found: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for line in results.lines():
        found[line["file"], line["runtime"], line["model"]].append(line)
    models = list(dict.fromkeys(model for _, _, model in found))
    files = list(dict.fromkeys(key[:2] for key in found))
    text = [f"| file | runtime | {' | '.join(models)} |", "| --- " * (len(models) + 2) + "|"]
    for file, runtime in files:
        cells = [_cell(found.get((file, runtime, model), [])) for model in models]
        text.append(f"| {file} | {runtime} | {' | '.join(cells)} |")
    results.path.with_suffix(".md").write_text("\n".join([*text, ""]), encoding="utf-8")


def _cell(measured: list[dict[str, str]]) -> str:
    """AP, and AP50(voc-area) in parentheses."""
    both = [[100 * float(line[name]) for line in measured] for name in ("ap", "ap50_voc_area")]
    texts = [
        f"{statistics.mean(each):.2f}" + (f" ± {statistics.stdev(each):.2f}" if len(each) > 1 else "")
        for each in both
        if each
    ]
    return f"{texts[0]} ({texts[1]})" if texts else ""


if __name__ == "__main__":
    main()
