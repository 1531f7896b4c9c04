"""The README's table of families is what the rows say, and its example of a family is the sample's."""

import re
from pathlib import Path

import pytest

from qdetr_cli import plugins
from qdetr_cli.families import FAMILIES
from qdetr_cli.support import HEADINGS, markdown, support_of, supported

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_families_is_what_the_rows_say():
    assert markdown() in README, f"put this table into README.md, section Families:\n{markdown()}"


def test_every_family_has_a_row():
    rows = re.findall(r"^\| `([\w-]+)` \|", markdown(), re.MULTILINE)
    assert sorted(rows) == sorted(FAMILIES)
    built_in = {entry.name for entry in plugins.entries() if entry.origin == "built-in"}
    assert rows == [row.family for row in supported() if row.family in built_in]


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("detr", ("dense", 'softmax, and "no object"', "shortest side 800, longest 1333", "any", "yes")),
        ("rt_detr", ("dense and deformable", "sigmoid", "640x640, multiples of 32", "any", "yes")),
        (
            "pp_doclayout_v2",
            ("dense and deformable", "sigmoid", "800x800, multiples of 32", "any", "no: no loss"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_in_words(name, cells):
    assert tuple(support_of(FAMILIES[name]).cells().values())[1:6] == cells


@pytest.mark.parametrize(
    ("name", "repository"),
    [("detr", "facebookresearch/detr"), ("d_fine", "Peterande/D-FINE"), ("yolos", "-")],
    ids=lambda value: value.replace("/", "-"),
)
def test_original_files_come_from_the_layouts(name, repository):
    assert support_of(FAMILIES[name]).cells()[HEADINGS[-1]] == repository


@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if not row.own_backbone], ids=str)
def test_any_backbone_needs_a_config_for_it(name):
    assert hasattr(FAMILIES[name].kind.config_class(), "backbone_config")


def test_the_example_of_a_family_is_that_of_the_sample():
    """Comments and the roles that are left out apart."""
    example = re.search(r'^register\("family".*?^```', README, re.MULTILINE | re.DOTALL)
    lines = [line.split("  # ")[0].strip() for line in example[0].splitlines()]
    sample = (ROOT / "plugins" / "anchor_detr.py").read_text(encoding="utf-8")
    shown = [line for line in lines if line not in ("...,", "```")]
    assert len(shown) > 10
    assert all(line in [each.strip() for each in sample.splitlines()] for line in shown), shown
