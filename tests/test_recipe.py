"""Recipes: what is read, what is refused, and what the messages say."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qdetr_cli.errors import RecipeError
from qdetr_cli.recipe import (
    FIGURE_2_11,
    ROLES,
    SLOT_DEFAULTS,
    SLOTS,
    Format,
    Named,
    Recipe,
    Rule,
    load_recipe,
    new_recipe,
    overlay,
    recipe_from_dict,
    recipe_names,
    recipe_path,
    resolve_format,
    role_matches,
)

FULL = """\
schema: 1
formats:
  w4: {bits: 4, per: channel}
  a4: {bits: 4, init: {name: percentile, percent: 99.9}}
rules:
  - {op: [linear, conv], weight: w4, input: a4}
  - {op: attention, q: {bits: 8}, probs: {bits: 8, unsigned: true}}
  - {role: sampling, keep: float}
train: {epochs: 3, lr: 1e-4}
distill: {teacher: float, terms: {logits: 1.0}}
ladder: {backbone: backbone, rest: [encoder, decoder]}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def fault(folder: Path, text: str, *overrides: str) -> str:
    """The message for a faulty recipe, without the folder's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_values_are_typed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert [rule.op for rule in recipe.rules] == [("linear", "conv"), ("attention",), ()]
    assert recipe.rules[0].weight == Format(bits=4, per="channel")
    assert recipe.rules[0].input is not None
    assert recipe.rules[0].input.init == Named(name="percentile", options={"percent": 99.9})
    assert recipe.rules[2].keep == "float"
    assert (recipe.train.epochs, recipe.train.lr) == (3.0, 1e-4)
    assert recipe.ladder == {"backbone": ("backbone",), "rest": ("encoder", "decoder")}


def test_rules_know_their_lines(tmp_path: Path) -> None:
    assert [rule.place for rule in load_recipe(write(tmp_path, FULL)).rules] == [
        "mine.yaml:6",
        "mine.yaml:7",
        "mine.yaml:8",
    ]


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(FULL, id="full"),
        pytest.param("schema: 1\n", id="empty"),
        pytest.param("schema: 1\ntrain: {ema: null, quantizer_lr: 1e-5, steps: 7}\n", id="ema off"),
        pytest.param("schema: 1\nexport: {to: openvino, size: [480, 640]}\n", id="pair"),
    ],
)
def test_round_trip_is_exact(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, text))
    again = recipe_from_dict(recipe.to_dict(), source="qdetr.json")
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert yaml.safe_load(yaml.safe_dump(recipe.to_dict())) == recipe.to_dict()  # JSON types only


def test_dict_and_back_sees_a_change(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    changed = recipe.to_dict()
    changed["rules"][0]["weight"]["bits"] = 3
    assert recipe_from_dict(changed, source="qdetr.json") != recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "schema: 1\nrules:\n  - op: linear\n    weight:\n      bits: 5.5\n",
            "mine.yaml:5: rules.0.weight.bits: 5.5 is not one of 2, 3, 4, 5, 6, 7, 8, float",
            id="bits",
        ),
        pytest.param(
            "schema: 1\ntrain:\n  epoch: 3\n",
            "mine.yaml:3: train.epoch: unknown key; did you mean epochs?; valid keys: epochs, steps,",
            id="near miss",
        ),
        pytest.param("schema: 1\ntrain: {epochs: 1, epochs: 2}\n", "train.epochs: set twice", id="duplicate"),
        pytest.param(
            "schema: 1\nformats:\n  w: {bits: 4}\nformats:\n  w: {bits: 8}\n",
            "mine.yaml:4: formats: set twice, on lines 2 and 4; keep one",
            id="duplicate section",
        ),
        pytest.param(
            "schema: 1\nformats: {w4: {bits: 4}}\nrules:\n  - {op: linear, weight: w4, input: w5}\n",
            "mine.yaml:4: rules.0.input: w5 is not a format; formats: w4, float; or write {bits: 8}",
            id="format name",
        ),
        pytest.param(
            "schema: 1\nformats:\n  wieghts: {bits: 4}\n  weights: {bits: 8}\n"
            "rules: [{op: conv, weight: weights}]\n",
            "mine.yaml:3: formats.wieghts: no rule uses this format; did you mean weights?",
            id="unused format",
        ),
        pytest.param("schema: 2\n", "mine.yaml:1: schema: 2 is not one of 1", id="schema"),
        pytest.param("train: {}\n", "mine.yaml:1: schema: is missing; write schema: 1", id="no schema"),
        pytest.param("", "mine.yaml: is empty", id="empty file"),
        pytest.param("- 1\n", "mine.yaml:1: is not a recipe", id="a list"),
        pytest.param("schema: 1\nrules: [\n", "mine.yaml:3: not YAML", id="no YAML"),
        pytest.param("schema: 1\nx: !!python/name:os.system\n", "mine.yaml:2: x: the tag", id="tag"),
        pytest.param("schema: 1\ntrain: &t {epochs: 1}\n", "mine.yaml:2: anchors and aliases", id="anchor"),
        pytest.param("schema: 1\ntrain: " + "[" * 40 + "]" * 40, "is nested too deep", id="deep"),
        pytest.param("schema: 1\ntrain: " + "[" * 9000, "is nested too deep", id="very deep"),
        pytest.param(
            "schema: 1\nrules: [{role: head, keep: float}]\n",
            "head is not a role; roles: backbone,",
            id="role",
        ),
        pytest.param(
            "schema: 1\nrules: [{weight: {bits: 4}}]\n", "rules.0: selects nothing", id="no selector"
        ),
        pytest.param("schema: 1\nrules: [{op: linear}]\n", "rules.0: sets nothing", id="no slot"),
        pytest.param(
            "schema: 1\nrules: [{op: linear, keep: float, weight: {bits: 4}}]\n",
            "leaves no slot",
            id="keep and slot",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, weight: 8}]\n",
            "mine.yaml:2: rules.0.weight: 8 is not a format; write {bits: 8}",
            id="number as format",
        ),
        pytest.param(
            "schema: 1\nexport: {size: [1, 2, 3]}\n", "export.size: [1, 2, 3] has too many entries", id="size"
        ),
        pytest.param("schema: 1\nrules: {op: linear}\n", "mine.yaml:2: rules: ", id="rules no list"),
        pytest.param(
            "schema: 1\nrules: [{op: lin, keep: float}]\n", "lin is not one of linear, conv,", id="op"
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, input: {bits: 4, per: head}}]\n",
            "rules.0.input: per: head does not fit input; valid: tensor",
            id="per head on input",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, input: {bits: 4, per: channel}}]\n",
            "per: channel does not fit input",
            id="per channel on input",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: attention, q: {bits: 4, per: channel}}]\n",
            "per: channel does not fit q; valid: tensor, head",
            id="per channel on q",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, input: {bits: 4, unsigned: true, symmetric: false}}]\n",
            "an unsigned grid has no offset",
            id="unsigned with offset",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, weight: {bits: 4, unsigned: true}}]\n",
            "weights are signed and symmetric",
            id="unsigned weight",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, input: {bits: 4, mid_rise: true}}]\n",
            "rules.0.input: mid_rise: only weights can do without a 0; drop the key",
            id="mid-rise input",
        ),
        pytest.param(
            "schema: 1\ndistill: {teacher: float, terms: {logits: 1.0}, fade: 0.0}\n",
            "distill.fade: ",
            id="fade",
        ),
        pytest.param(
            "schema: 1\ndistill: {fade: 0.5}\n",
            "fade: there are no terms that could fade",
            id="fade of nothing",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, weight: {}}]\n", "rules.0.weight: sets nothing", id="no format"
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, weight: {bits: 4, init: {percent: 9}}}]\n",
            "rules.0.weight.init.name: is missing",
            id="plugin without name",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, weight: {bits: 4, init: {name: mse, x: [1]}}}]\n",
            "rules.0.weight.init.x: an option is a number",
            id="plugin option",
        ),
        pytest.param(
            "schema: 1\nrules: [{op: linear, keep: float, line: 3}]\n", "rules.0.line: unknown", id="line"
        ),
        pytest.param("schema: 1\ntrain: {epochs: true}\n", "train.epochs: true is not a number", id="bool"),
        pytest.param("schema: 1\ntrain: {batch_size: 1.5}\n", "1.5 is not a whole number", id="fraction"),
        pytest.param(
            "schema: 1\ntrain: {batch_size: 0}\n", "0 should be greater than or equal to 1", id="zero"
        ),
        pytest.param("schema: 1\ntrain: {lr: 1e999}\n", "is not a finite number", id="infinite"),
        pytest.param("schema: 1\ntrain: {auxiliary: no}\n", "no is not true or false", id="no is a text"),
        pytest.param("schema: 1\ntrain: 3\n", "mine.yaml:2: train: 3 is not a section", id="no section"),
        pytest.param(
            "schema: 1\ndistill: {teacher: float}\n", "distill: a teacher without terms", id="idle teacher"
        ),
        pytest.param("schema: 1\nladder: {a: heads}\n", "ladder: heads is not a role", id="ladder role"),
        pytest.param(
            "schema: 1\nextends: w4a5\n", "extends: w4a5: no such recipe; did you mean w4a4?", id="parent"
        ),
        pytest.param(
            "schema: 1\nextends: other.yaml\n", "extends: other.yaml: no such recipe", id="parent file"
        ),
    ],
)
def test_faults_say_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    assert message in fault(tmp_path, text)


def test_all_faults_come_at_once_in_order(tmp_path: Path) -> None:
    text = (
        "schema: 1\ntrian: {}\ntrain: {lr: fast, epochs: 1, epochs: 2}\n"
        "formats: {x: {bits: 9}}\nrules: [{op: conv}]\n"
    )
    lines = fault(tmp_path, text).splitlines()
    assert lines[0] == f"{len(lines) - 1} faults in mine.yaml:"
    places = [line.strip().partition(" ")[0] for line in lines[1:]]
    assert places == sorted(places)
    assert {"trian", "train.lr", "train.epochs", "formats.x.bits", "rules.0"} <= {
        line.split(": ")[1].strip() for line in lines[1:]
    }


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{bits: 9}", "mine.yaml:2: formats.w.bits: 9 is not one of"),
        ("{}", "mine.yaml:2: formats.w: sets nothing"),
        ("8", "mine.yaml:2: formats.w: 8 is not a section"),
    ],
)
def test_a_fault_of_a_named_format_is_said_once(tmp_path: Path, stated: str, message: str) -> None:
    rules = "rules: [{op: linear, weight: w, input: w}, {op: conv, weight: w}]\n"
    assert fault(tmp_path, f"schema: 1\nformats: {{w: {stated}}}\n{rules}").startswith(message)


def test_a_named_format_in_the_wrong_slot_is_said_at_the_rule(tmp_path: Path) -> None:
    text = "schema: 1\nformats: {w: {bits: 4, per: channel}}\nrules: [{op: conv, weight: w, input: w}]\n"
    assert fault(tmp_path, text).startswith("mine.yaml:3: rules.0.input: per: channel does not fit input")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("w4a5", "did you mean w4a4?"), ("nothing.yaml", "shipped: "), ("../w4a4", "shipped: ")],
)
def test_unknown_recipes_list_the_shipped_ones(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match="no such recipe") as caught:
        load_recipe(name)
    assert hint in str(caught.value)
    assert all(shipped in str(caught.value) for shipped in recipe_names())


def test_recipe_path_stays_on_the_shelf() -> None:
    assert recipe_path("w4a4").name == "w4a4.yaml"
    with pytest.raises(RecipeError, match="no such recipe"):
        recipe_path("../recipes/w4a4")


def test_extends_joins_rules_and_merges_mappings(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(
        tmp_path / "sub",
        "schema: 1\nplugins: [mine]\nformats: {w: {bits: 4, init: {name: percentile, percent: 99}}}\n"
        "rules: [{op: linear, weight: w}]\ntrain: {epochs: 3, lr: 1e-3, augment: {flip: 0.5}}\n"
        "ladder: {a: [backbone], b: [encoder]}\n",
        "parent.yaml",
    )
    child = (
        "schema: 1\nextends: sub/parent.yaml\nplugins: more\nformats: {w: {bits: 3, init: {name: mse}}}\n"
        "rules: [{op: conv, keep: float}]\ntrain: {lr: 1e-5, augment: {crop: 0.1}}\n"
        "ladder: {all: [decoder]}\n"
    )
    recipe = load_recipe(write(tmp_path, child))
    assert [rule.place for rule in recipe.rules] == ["parent.yaml:4", "mine.yaml:5"]
    assert recipe.rules[0].weight == Format(bits=3, init=Named(name="mse"))  # no percent left over
    assert (recipe.train.epochs, recipe.train.lr) == (3, 1e-5)
    assert (recipe.train.augment.flip, recipe.train.augment.crop) == (0.5, 0.1)
    assert recipe.ladder == {"all": ("decoder",)}
    assert recipe.plugins == (str(tmp_path / "sub" / "mine"), str(tmp_path / "more"))


def test_a_parent_of_two_parents_counts_once(tmp_path: Path) -> None:
    write(tmp_path, "schema: 1\nrules: [{op: linear, keep: float}]\n", "root.yaml")
    for name in ("left", "right"):
        write(tmp_path, f"schema: 1\nextends: root.yaml\ntrain: {{seed: {len(name)}}}\n", f"{name}.yaml")
    recipe = load_recipe(write(tmp_path, "schema: 1\nextends: [left.yaml, right.yaml]\n"))
    assert len(recipe.rules) == 1
    assert recipe.train.seed == len("right")


def test_a_cycle_is_named(tmp_path: Path) -> None:
    write(tmp_path, "schema: 1\nextends: mine.yaml\n", "other.yaml")
    message = fault(tmp_path, "schema: 1\nextends: other.yaml\n")
    assert (
        message
        == "other.yaml:2: extends: a recipe cannot extend itself: mine.yaml -> other.yaml -> mine.yaml"
    )


def test_faults_of_a_parent_name_the_parent(tmp_path: Path) -> None:
    write(tmp_path, "schema: 1\ntrain: {lr: 1}\nrules:\n  - {op: linear, weight: {bits: 1}}\n", "other.yaml")
    assert fault(tmp_path, "schema: 1\nextends: other.yaml\n").startswith(
        "other.yaml:4: rules.0.weight.bits: 1 is"
    )


def test_a_section_with_nothing_in_it_inherits(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "schema: 1\nextends: w4a4\nrules:\ntrain:\n  # epochs: 3\n"))
    assert recipe == load_recipe("w4a4").model_copy(update={"extends": ("w4a4",)})


@pytest.mark.parametrize(
    ("flag", "read"),
    [
        pytest.param("train.epochs=4", lambda r: r.train.epochs == 4, id="number"),
        pytest.param("train.lr=1e-3", lambda r: r.train.lr == 1e-3, id="exponent"),
        pytest.param("train.ema=null", lambda r: r.train.ema is None, id="null"),
        pytest.param(
            "train.augment.scales=[96, 128]", lambda r: r.train.augment.scales == (96, 128), id="list"
        ),
        pytest.param(
            "rules.0.weight.bits=8", lambda r: r.rules[0].weight == Format(bits=8, per="channel"), id="named"
        ),
        pytest.param("rules.2.role=query", lambda r: r.rules[2].role == ("query",), id="selector"),
        pytest.param("formats.w4.bits=2", lambda r: r.rules[0].weight.bits == 2, id="format"),
        pytest.param("rules.0.input=float", lambda r: r.rules[0].input == Format(bits="float"), id="float"),
        pytest.param("rules.1.q={bits: 4}", lambda r: r.rules[1].q == Format(bits=4), id="mapping"),
        pytest.param("rules.1.k.bits=4", lambda r: r.rules[1].k == Format(bits=4), id="new slot"),
        pytest.param(
            "formats.a4.init.percent=99",
            lambda r: r.rules[0].input.init.options == {"percent": 99},
            id="option",
        ),
        pytest.param("distill.teacher=null", lambda r: r.distill.teacher is None, id="no teacher"),
    ],
)
def test_overrides(tmp_path: Path, flag: str, read) -> None:
    path = write(tmp_path, FULL)
    assert read(load_recipe(path, [flag]))
    assert not read(load_recipe(path))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("train.epochs=many", "--set train.epochs=many: train.epochs: many is not a number"),
        ("train.epoch=3", "--set train.epoch=3: train.epoch: unknown key; did you mean epochs?"),
        ("rules.7.weight.bits=4", "rules.7: 7 is not one of its 3 entries, numbered from 0"),
        ("rules.first.weight=4", "rules.first: first is not one of its 3 entries"),
        ("train.epochs.x=3", "train.epochs.x: train.epochs is a value and not a section"),
        ("train.epochs", "--set train.epochs: is not key=value; for example --set train.epochs=3"),
        ("extends=w4a4", "extends: cannot be set by a flag"),
        ("rules.0.weight=w9", "rules.0.weight: w9 is not a format"),
        ("rules.0.weight.bits=[", "not YAML"),
    ],
)
def test_faults_of_overrides_name_the_flag(tmp_path: Path, flag: str, message: str) -> None:
    assert message in fault(tmp_path, FULL, flag)


@pytest.mark.parametrize("slot", SLOTS)
def test_slot_defaults(slot) -> None:
    made = resolve_format(slot, Format(bits=4))
    assert (made.quantizer, made.init) == ("lsq", "mse")
    assert made.per == {"weight": "channel", "input": "tensor", "output": "tensor"}.get(slot, "head")
    assert made.symmetric == (slot in ("weight", "probs"))
    assert (made.qmin, made.qmax) == ((0, 15) if slot == "probs" else (-8, 7))
    assert SLOT_DEFAULTS[slot].bits is None


def test_later_formats_win_field_by_field() -> None:
    merged = overlay([Format(bits=4, per="head"), Format(bits=8), Format(symmetric=False)])
    assert merged == Format(bits=8, per="head", symmetric=False, unsigned=False)


@pytest.mark.parametrize(
    ("slot", "stated", "unsigned", "symmetric"),
    [
        pytest.param("probs", Format(bits=8, symmetric=False), False, False, id="probs with offset"),
        pytest.param("input", Format(bits=8, unsigned=True), True, True, id="unsigned input"),
        pytest.param("probs", Format(bits=8, unsigned=False), False, True, id="signed probs"),
    ],
)
def test_sign_and_offset_agree(slot, stated: Format, unsigned: bool, symmetric: bool) -> None:
    made = resolve_format(slot, stated)
    assert (made.unsigned, made.symmetric) == (unsigned, symmetric)


def test_roles_match_themselves_and_children() -> None:
    assert [role for role in ROLES if role_matches("decoder", role)] == [
        "decoder.self_attention",
        "decoder.cross_attention",
        "decoder.cross_attention.position",
        "decoder.ffn",
        "decoder.other",
    ]
    assert role_matches("box_head", "box_head.last")
    assert not role_matches("box_head.last", "box_head")
    assert not role_matches("back", "backbone")


def test_the_default_ladder_reaches_every_role() -> None:
    patterns = [pattern for patterns in FIGURE_2_11.values() for pattern in patterns]
    assert all(any(role_matches(pattern, role) for pattern in patterns) for role in ROLES)


def test_rules_compare_without_their_place() -> None:
    rule = Rule(op=("linear",), keep="float", line=3, source="a.yaml")
    assert rule == Rule(op=("linear",), keep="float")
    assert rule != Rule(op=("conv",), keep="float", line=3, source="a.yaml")


def test_new_recipe_loads_and_refuses_to_overwrite(tmp_path: Path) -> None:
    path = new_recipe(tmp_path / "fresh.yaml", base="w3a3")
    recipe = load_recipe(str(path))
    assert recipe.extends == ("w3a3",)
    assert len(recipe.rules) == len(load_recipe("w3a3").rules) + 1
    with pytest.raises(RecipeError, match="exists already"):
        new_recipe(path)
    with pytest.raises(RecipeError, match="no such recipe"):
        new_recipe(tmp_path / "b.yaml", base="nothing")
    with pytest.raises(RecipeError, match=r"ends in \.yaml"):
        new_recipe(tmp_path / "b.txt")


def test_new_recipe_from_a_file_extends_it_relatively(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base = write(tmp_path, FULL)
    path = new_recipe(tmp_path / "sub" / "fresh.yaml", base=base)
    assert load_recipe(str(path)).extends == ("../mine.yaml",)


def test_every_commented_line_of_a_new_recipe_is_valid(tmp_path: Path) -> None:
    path = new_recipe(tmp_path / "fresh.yaml")
    lines = path.read_text().splitlines()
    opened = [
        line.replace("# ", "", 1)
        if line.lstrip().startswith(("# -", "# calibrate", "# train", "# distill"))
        else line
        for line in lines
    ]
    assert len(load_recipe(write(tmp_path, "\n".join(opened))).rules) == len(load_recipe("w4a4").rules) + 4


def test_recipes_need_no_torch() -> None:
    code = "import sys, qdetr_cli.recipe as r; r.load_recipe('w4a4'); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_recipe_needs_nothing_but_its_schema() -> None:
    assert Recipe.model_validate({"schema": 1}).rules == ()


def test_a_recipe_of_an_older_checkpoint_is_read():
    """`quantizer_lr: null` was the rate of the weights before rates were relative."""
    recipe = load_recipe("w4a4")
    values = recipe.to_dict()
    values["train"]["quantizer_lr"] = None
    assert recipe_from_dict(values, source="qdetr.json") == recipe
