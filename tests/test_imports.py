"""Imports go one way, and the command line answers at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qdetr_cli

PACKAGE = Path(qdetr_cli.__file__).parent
LAYERS = (
    ("errors", "coco_names", "instructions", "reading", "structure"),
    (
        "launch",
        "recipe",
        "plugins",
        "boxes",
        "runs",
        "sessions",
        "scenes",
        "processors",
        "roles",
        "head_fit",
    ),
    (
        "alignment",
        "balance",
        "devices",
        "scene_files",
        "families",
        "data",
        "ranges",
        "samples",
        "manifest",
        "signals",
        "matching",
        "fold",
        "backbones",
        "tied",
    ),
    ("budget", "processes"),
    (
        "configs",
        "batchnorm",
        "box_counts",
        "folders",
        "compiled",
        "recomputed",
        "features",
        "terms",
        "metrics",
        "recording",
        "schedule",
        "divergence",
        "residuals",
    ),
    ("original", "fake_quant", "losses", "trace"),
    ("operators",),
    ("quantizers",),
    ("checkpoint", "layers", "plan", "attention", "support", "teacher", "one_to_many"),
    ("capture", "sums", "classes", "oscillation", "objective", "packed"),
    ("rewrite", "storage"),
    ("calibrate", "engine", "stages", "rates", "progress", "evaluate", "models"),
    ("train", "export"),
    ("artefact", "benchmark"),
    ("results",),
    ("student", "comparison", "splits"),
    ("exporting",),
    ("candidates", "running"),
    ("pipeline",),
    ("demo", "plots", "delivery"),
    ("documents",),
    ("tables",),
    ("report",),
    ("cli",),
    ("__main__",),
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    found.pop("__init__")
    return found


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "qdetr_cli":
                names |= {alias.name for alias in node.names}
            elif node.module.startswith("qdetr_cli."):
                names.add(node.module.split(".")[1])
    return names - {"__version__"}


def test_every_module_has_a_layer():
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_a_module_imports_only_from_below(module):
    for path in modules()[module]:
        above = {name for name in imported(path) - {module} if LEVEL[name] >= LEVEL[module]}
        assert not above, f"{path.name} imports {sorted(above)}"


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["recipe", "list"], ["quantize", "--help"]], ids=" ".join
)
def test_light_commands_import_no_torch(command):
    code = (
        "import sys\nfrom qdetr_cli.cli import app\n"
        f"try:\n    app({command!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
