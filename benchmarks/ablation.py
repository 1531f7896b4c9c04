"""The ablation table of Q-DETR on any detector and data: rows of methods, columns of bits, several seeds.

    python -m benchmarks.ablation runs/ablation                       (the embedded detector and digit scenes)
    python -m benchmarks.ablation runs/long --set train.steps=4000 --results runs/long    (another schedule)
    python -m benchmarks.ablation runs/voc --model MODEL --data VOC --rows baseline best --bits 4-4-8
    python -m benchmarks.ablation runs/ablation --ladder              (figure 2.11: fine-tuned at each rung)

Rows and columns are in benchmarks/ablation.yaml. Each run is one `qdetr finetune` (the row `calibrated` one
`qdetr quantize`); the averaged weights of its last step are measured, never the best evaluation. Finished
runs are in the results and are not run again, an interrupted one is resumed, and the same command started
twice shares the queue.
"""

import argparse
import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ablation_table import CALIBRATED, write_table
from benchmarks.ledger import Ledger, commit
from qdetr_cli import pipeline, report, running
from qdetr_cli.demo import SETTINGS, embedded
from qdetr_cli.errors import RunError
from qdetr_cli.metrics import Metrics
from qdetr_cli.models import Source
from qdetr_cli.recipe import load_recipe
from qdetr_cli.results import DataSource
from qdetr_cli.runs import write_json
from qdetr_cli.scene_files import write_scenes

HERE = Path(__file__).parent
MENU, RESULTS = HERE / "ablation.yaml", HERE / "results"
COLUMNS = ("model", "bits", "row", "seed", "ap50_voc_area_float", "ap50_voc_area")
MORE = ("ap_float", "ap", "steps", "seconds", "commit", "settings")
TRAIN_IMAGES, VAL_IMAGES = 24_000, 2_000
# A small detector and minutes instead of a large one and days; --set goes over it.
SCHEDULE = (
    *SETTINGS,
    "train.steps=500",
    "train.batch_size=16",
    "train.warmup_steps=50",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the table."""

    model: str
    bits: str
    row: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its line in the results."""
        return (self.model, self.bits, self.row, str(self.seed))

    @property
    def folder(self) -> Path:
        """Where it runs, below the runs folder."""
        return Path(*(part.replace("/", "_") for part in self.key))


def main(words: Sequence[str] | None = None) -> None:
    """Run what is asked for and not measured yet, then write the table and the plot."""
    menu = yaml.safe_load(MENU.read_text(encoding="utf-8"))
    arguments = _arguments(words, menu)
    data, source = _data(arguments), _source(arguments.model)
    path = arguments.results / ("ladder.csv" if arguments.ladder else "ablation.csv")
    results = Ledger(path=path, columns=(*COLUMNS, *MORE), keys=4)
    for seed in arguments.seeds:  # the whole table with one seed, then with the next
        for bits in arguments.bits:
            rows = _rows(menu, bits, ladder=arguments.ladder)
            for row in [each for each in rows if each in (arguments.rows or rows)]:
                cell = Cell(model=arguments.model, bits=bits, row=row, seed=seed)
                _run(cell, cell_recipe(menu["bits"][bits], rows[row]), source, data, results, arguments)
    write_table(path)


def cell_recipe(bits: str, row: dict[str, Any]) -> dict[str, Any]:
    """What a recipe file of this cell says: what the row puts over the recipe of the bits."""
    over = {key: value for key, value in row.items() if key != "extends"}
    return {"schema": 1, "extends": [bits, *row.get("extends", [])], **over}


def _arguments(words: Sequence[str] | None, menu: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs, and of the scenes if there is no --data")
    parser.add_argument("--model", default="conditional_detr", help="embedded, or any float MODEL")
    parser.add_argument("--data", type=Path, help="a VOC or COCO root")
    parser.add_argument(
        "--train-images", type=int, default=TRAIN_IMAGES, help="scenes that are written to learn from"
    )
    parser.add_argument(
        "--bits", nargs="+", choices=list(menu["bits"]), default=["4-4-8", "3-3-8", "2-2-8", "4-4-4"]
    )
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ladder", action="store_true", help="quantize and fine-tune group by group")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    if arguments.train_images < 1:
        parser.error(f"--train-images: {arguments.train_images} is not 1 or more")
    if arguments.data is not None and arguments.train_images != TRAIN_IMAGES:
        parser.error("--train-images is of scenes that are written here; --data has its own images")
    known = [row for bits in arguments.bits for row in _rows(menu, bits, ladder=arguments.ladder)]
    for row in arguments.rows or ():
        if row not in known:
            parser.error(f"--rows: there is no row {row!r}; there are {', '.join(dict.fromkeys(known))}")
    return arguments


def _data(arguments: argparse.Namespace) -> DataSource:
    if arguments.data is not None:
        return DataSource(arguments.data)
    scenes = arguments.runs / "scenes"
    if not scenes.exists():
        write_scenes(scenes, train=arguments.train_images, val=VAL_IMAGES)
    found = len((scenes / "voc/ImageSets/Main/train.txt").read_text(encoding="utf-8").split())
    if found != arguments.train_images:
        sys.exit(f"{scenes}: {found} images to learn from, not {arguments.train_images}; name other runs")
    return DataSource(scenes / "voc")


def _source(model: str) -> Source:
    try:
        return embedded(model)
    except RunError:
        return Source(model)


def _rows(menu: dict[str, Any], bits: str, *, ladder: bool) -> dict[str, Any]:
    """What each row of a column puts over the recipe of its bits."""
    if ladder:
        return _rungs(menu["bits"][bits])
    rows: dict[str, Any] = menu["rows"]
    if bits == "float":  # the other rows are about quantizers and about learning from this very model
        return {"baseline": rows["baseline"]}
    return rows


def _rungs(recipe: str) -> dict[str, Any]:
    """Rows that quantize one more group of the recipe's ladder each; the groups after it stay float."""
    groups = load_recipe(recipe).ladder
    rows: dict[str, Any] = {}
    for count, name in enumerate(groups, start=1):
        later = [role for roles in list(groups.values())[count:] for role in roles]
        rows[f"+ {name}"] = {"rules": [{"role": later, "keep": "float"}]} if later else {}
    return rows


def _run(
    cell: Cell,
    recipe: dict[str, Any],
    source: Source,
    data: DataSource,
    results: Ledger,
    arguments: argparse.Namespace,
) -> None:
    """One cell: fine-tune, or go on with it, and add its line."""
    if results.has(cell.key):
        return
    folder = arguments.runs / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _claimed(folder) as mine:
        if not mine:
            print(*cell.key, "is being run by another process", flush=True)
            return
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        own = [f"train.seed={cell.seed}", f"calibrate.seed={cell.seed}"]
        settings = [*SCHEDULE, *arguments.overrides, *own]
        page, out = report.Page(json=True), folder / "run"
        measure = _calibrated if cell.row == CALIBRATED else _fine_tuned
        found, steps, seconds = measure(source, str(file), data, out, settings, page)
        before = _float_metrics(source, cell.model, data, arguments.runs, page)
        line = [*cell.key, *before[:1], found.ap50_voc_area, before[1], found.ap, steps]
        results.add([*line, round(seconds), commit(), " ".join(_settings(arguments))])
        print(*(f"{each:.4f}" if isinstance(each, float) else each for each in line), flush=True)


def _settings(arguments: argparse.Namespace) -> list[str]:
    """What was asked for that is no default, as the results tell it."""
    few = arguments.train_images != TRAIN_IMAGES
    return [*([f"train_images={arguments.train_images}"] if few else []), *arguments.overrides]


def _fine_tuned(
    source: Source, recipe: str, data: DataSource, out: Path, settings: list[str], page: report.Page
) -> tuple[Metrics, int, float]:
    """The metrics of the averaged weights of the last step, the steps, and their seconds."""
    fit = pipeline.finetune(
        source,
        recipe=recipe,
        data=data,
        out=out,
        overrides=settings,
        resume=(out / "run.json").exists(),
        listener=page,
    ).fit
    return fit.last, fit.steps, fit.seconds


def _calibrated(
    source: Source, recipe: str, data: DataSource, out: Path, settings: list[str], page: report.Page
) -> tuple[Metrics, int, float]:
    """The same of a model that is calibrated and not trained."""
    if not out.exists():
        pipeline.quantize(
            source, recipe=recipe, data=data, out=out, overrides=settings, measured=False, listener=page
        )
    return running.evaluate(Source(str(out)), data=data, listener=page).metrics, 0, 0.0


def _float_metrics(
    source: Source, model: str, data: DataSource, runs: Path, page: report.Page
) -> tuple[float, float]:
    """AP50(voc-area) and AP of the float model, measured once."""
    path = runs / model.replace("/", "_") / "float.json"
    if not path.exists():
        metrics = running.evaluate(source, data=data, listener=page).metrics
        write_json(path, {"ap50_voc_area": metrics.ap50_voc_area, "ap": metrics.ap})
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return float(found["ap50_voc_area"]), float(found["ap"])


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """True for the first process that asks for a folder; the system lets go of it when that process ends."""
    with (folder / "claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


if __name__ == "__main__":
    sys.exit(main())
