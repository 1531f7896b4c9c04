"""What a command is given and gives back, and who hears of it on the way."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdetr_cli.benchmark.turns import Timing
from qdetr_cli.checkpoint import Detector
from qdetr_cli.evaluate import Rung
from qdetr_cli.export.floats import FloatOperation
from qdetr_cli.export.kernels import Kernels
from qdetr_cli.metrics import Detections, Metrics
from qdetr_cli.plan import Plan
from qdetr_cli.recipe import Recipe
from qdetr_cli.storage import Storage
from qdetr_cli.trace import GraphFacts
from qdetr_cli.train import Fit, Watch

if TYPE_CHECKING:  # it needs the extra [export]
    from qdetr_cli.export.parity import Parity

Advance = Callable[[int], None]


class Listener(Watch, Protocol):
    """Who is told what happens, while it happens."""

    def say(self, text: str) -> None:
        """Something that the user should know."""

    def training(self) -> AbstractContextManager[None]:
        """A progress bar that follows `stepped`."""

    def progress(self, what: str, total: int) -> AbstractContextManager[Advance]:
        """A progress bar; the function it gives is told how many are done."""


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where the data comes from: a root or json, the image folder of a json, and the two splits."""

    path: Path
    images: Path | None = None
    train: str = "train"
    split: str = "val"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `qdetr inspect` found: graph facts, and the plan of a recipe or of a fake-quant checkpoint."""

    detector: Detector
    facts: GraphFacts
    plan: Plan | None
    recipe: Recipe | None
    storage: Storage | None = None  # of a folder that qdetr wrote

    @property
    def parameters(self) -> int:
        """Weights, biases and all else that is learned, quantizers apart."""
        own = self.detector.model.named_parameters()
        return sum(
            p.numel() for name, p in own if not name.endswith(("_quantizer.step", "_quantizer.offset"))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What `qdetr quantize` made: metrics before and after (None: not measured), and silent quantizers."""

    folder: Path
    plan: Plan
    silent: tuple[str, ...]
    before: Metrics | None
    after: Metrics | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What `qdetr finetune` made, and the plan it trained under (None for a float training)."""

    folder: Path
    plan: Plan | None
    fit: Fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What `qdetr eval` found and measured; `ladder` is empty unless asked for."""

    metrics: Metrics
    detections: tuple[Detections, ...]
    category_ids: tuple[int, ...]  # of each data-set label
    images: int
    split: str
    ladder: tuple[Rung, ...]
    warnings: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedImage:
    """The objects of one image above the threshold: boxes (K, 4) xyxy in pixels, scores and class names."""

    path: Path
    boxes: list[list[float]]
    scores: list[float]
    classes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What `qdetr export` wrote, how it runs, and how it compares with the model (None, empty: not done)."""

    to: str
    files: tuple[Path, ...]
    quantized: bool
    size: tuple[int, int] | None  # (H, W) of the images that it takes
    bytes: int  # of all files
    float_bytes: int  # of the weights and biases as float32
    kernels: Kernels | None
    floats: tuple[FloatOperation, ...]  # of the kernels, those in float, with the reason
    parity: "Parity | None"
    metrics: dict[str, Metrics]  # of "model" and "file"
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmarked:
    """What `qdetr benchmark` measured: timings in the order given, and for each the float one beside it."""

    size: tuple[int, int]
    batch: int
    threads: int
    timings: tuple[Timing, ...]
    references: tuple[Timing | None, ...]  # the float model in the same runtime
    machine: dict[str, Any]
    busy: bool
