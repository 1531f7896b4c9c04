"""The ablation: its rows are the recipes they name, its queue is resumed, and its table is arithmetic."""

import csv
from pathlib import Path

import pytest
import yaml
from tiny_runs import FAST, write_coco, write_model

from benchmarks import ablation
from benchmarks.ablation_table import write_table
from qdetr_cli.recipe import load_recipe

MENU = yaml.safe_load(ablation.MENU.read_text())
NAMED = [
    ("best", "4-4-8", "best_w4a4"),
    ("best", "3-3-8", "best_w3a3"),
    ("best", "2-2-8", "best_w2a2"),
    ("best", "4-4-4", "best_w4a4_attn4"),
    ("best, residual sums at 8 bits", "4-4-8", "best_w4a4_sums"),
    ("Q-DETR as published", "4-4-8", "qdetr_w4a4"),
    ("Q-DETR as published", "3-3-8", "qdetr_w3a3"),
    ("Q-DETR as published", "2-2-8", "qdetr_w2a2"),
]
RESULTS = """model,bits,row,seed,ap50_voc_area_float,ap50_voc_area
detr,4-4-8,calibrated,0,0.9,0.5
detr,4-4-8,baseline,0,0.9,0.88
detr,4-4-8,baseline,1,0.9,0.86
detr,4-4-8,best,0,0.9,0.89
detr,4-4-8,best,1,0.9,0.88
detr,8-8-8,baseline,0,0.9,0.899
detr,8-8-8,best,0,0.9,0.9
"""


def recipe_of(folder: Path, row: str, bits: str):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(ablation.cell_recipe(MENU["bits"][bits], MENU["rows"][row])))
    return load_recipe(str(file))


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("row", "bits", "name"), NAMED)
def test_a_row_is_the_recipe_it_names(tmp_path, row, bits, name):
    here, there = recipe_of(tmp_path, row, bits).to_dict(), load_recipe(name).to_dict()
    assert here | {"extends": None} == there | {"extends": None}


@pytest.mark.parametrize("bits", [each for each in MENU["bits"] if each != "float"])
def test_every_row_is_a_recipe_and_the_baseline_has_no_teacher(tmp_path, bits):
    recipes = {row: recipe_of(tmp_path, row, bits) for row in MENU["rows"]}
    assert recipes["baseline"].distill.teacher is None
    assert not recipes["baseline"].distill.terms
    assert recipes["baseline"].rules == recipes["best"].rules
    assert recipes["baseline"].train == recipes["best"].train
    assert recipes["+memory"].distill.terms.keys() == {"memory"}
    assert len(recipes["+DA"].rules) == len(recipes["baseline"].rules) + 1


def test_the_table_tells_mean_spread_and_the_part_won_back(tmp_path):
    path = tmp_path / "ablation.csv"
    path.write_text(RESULTS)
    write_table(path)
    table = path.with_suffix(".md").read_text()
    # Gaps of the baseline are 2 and 4 points, of best 1 and 2: half of 3 points is won back. Of the 0.1
    # points at 8 bits no part is told, nor of a model that was not trained.
    assert "| | 4-4-8 | 8-8-8 |" in table
    assert "| calibrated | 40.00 (1) |  |" in table
    assert "| baseline | 3.00 ± 1.41 (2) | 0.10 (1) |" in table
    assert "| best | 1.50 ± 0.71 (2) [50 %] | 0.00 (1) |" in table
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_queue_is_measured_once_and_gone_on_with(tmp_path, capsys):
    model = write_model(tmp_path / "model", classes=("cat", "dog"))
    data = write_coco(tmp_path / "coco")
    sets = [word for each in [*FAST, "train.warmup_steps=0"] for word in ("--set", each)]
    words = [str(tmp_path / "runs"), "--model", str(model), "--data", str(data), "--bits", "4-4-8"]
    words += ["--seeds", "3", "--results", str(tmp_path / "results"), *sets]
    ablation.main([*words, "--rows", "baseline"])
    first = lines(tmp_path / "results/ablation.csv")
    assert [(each["row"], each["seed"], each["steps"]) for each in first] == [("baseline", "3", "2")]
    capsys.readouterr()
    ablation.main([*words, "--rows", "calibrated", "baseline"])
    both = lines(tmp_path / "results/ablation.csv")
    assert [each["row"] for each in both] == ["baseline", "calibrated"]
    assert both[0] == first[0], "what is in the results is not run again"
    assert "baseline" not in capsys.readouterr().out
    assert both[0]["settings"] == " ".join(sets[1::2])
    assert {each["ap_float"] for each in both} == {first[0]["ap_float"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train-images", "5"], "--data has its own images"),
        (["--rows", "bset"], "there is no row 'bset'; there are calibrated, baseline, +DA"),
        (["--bits", "5-5-8"], "invalid choice: '5-5-8'"),
        (["--bits", "float", "--rows", "best"], "there is no row 'best'; there are baseline"),
        (["--ladder", "--rows", "baseline"], "there is no row 'baseline'; there are + backbone, + encoder"),
    ],
)
def test_what_it_does_not_know_is_refused_before_anything_runs(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        ablation.main([str(tmp_path / "runs"), "--data", str(tmp_path), *words])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
