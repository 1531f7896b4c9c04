"""No test has a network, or more than one thread; what is promised of every family is tested with a few."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Dense attention, deformable attention with denoising, and two foreign backbones: what these files promise of
# every family is tested with them, and with all others by `pytest -m ""`.
ALWAYS = ("conditional_detr", "d_fine", "detr, swinv2", "rt_detr, timm mobilenet")
OF_EVERY_FAMILY = (
    "test_alignment_models",
    "test_backbones",
    "test_calibrate",
    "test_capture",
    "test_commands_families",
    "test_export_detr",
    "test_export_rt_detr",
    "test_family_gradients",
    "test_family_losses",
    "test_family_quantized",
    "test_family_saving",
    "test_family_training",
    "test_one_to_many",
    "test_packed_families",
    "test_plan",
    "test_processes",
    "test_real_time",
    "test_recomputed",
    "test_stress",
    "test_vision_transformers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow is what is about a family which is not in ALWAYS; a test that knows none keeps its first."""
    tests: dict[tuple[str, str], list[tuple[str, pytest.Item]]] = {}
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if name is not None and item.path.stem in OF_EVERY_FAMILY:
            tests.setdefault((item.path.stem, item.originalname), []).append((name, item))
    for found in tests.values():
        stays = {name for name, _ in found if name in ALWAYS} or {found[0][0]}
        for name, item in found:
            if name not in stays:
                item.add_marker(pytest.mark.slow)
