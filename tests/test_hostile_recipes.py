"""Recipes, and the files of a run, of strangers: one message, or a right answer; no code is run."""

import json
from pathlib import Path

import pytest
from hostile import FUZZ, changed, damaged, outcome, pipe
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import refused

from qdetr_cli.recipe import load_recipe, recipe_folder, recipe_from_dict
from qdetr_cli.runs import JOURNAL_FILE, RUN_FILE, Journal, resumes

WHOLE = (recipe_folder() / "_base.yaml").read_bytes()
BITS = b"""schema: 1
extends: w4a4
rules:
  - {role: encoder.ffn, weight: {bits: 3, init: minmax}}
train: {epochs: 3}
"""


@pytest.mark.parametrize("whole", [WHOLE, BITS], ids=["base", "small"])
def test_damaged_recipes(tmp_path, whole):
    path, seen = tmp_path / "mine.yaml", set()
    words = st.sampled_from([b"1", b"w4a4", b"bits", b"role", b"3", b"true", b":", b"{", b"  "])
    strange = st.sampled_from(
        [b"&a [*a]", b"*a", b"!!python/object/apply:os.system [ls]", b"1e999", b"-1", b"9" * 400, b"\t",
         b"\xff", b"[[[[", b".nan", b"0x10", b"? a", b"--- ", b"<<: {a: 1}", b"null", b"''"]
    )  # fmt: skip

    @FUZZ
    @given(damaged(whole) | st.tuples(words, strange, st.just(1)).map(lambda three: whole.replace(*three)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        seen.add(outcome(lambda: load_recipe(str(path))) == "right")

    check()
    assert False in seen


def test_changed_recipes_of_manifests():
    """As JSON, where a number may be of any size."""
    whole = load_recipe("qdetr_w4a4").to_dict()

    @FUZZ
    @given(changed(whole, times=3))
    def check(content: dict) -> None:
        outcome(lambda: recipe_from_dict(content, source="it"))

    check()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
        "a: &a [*a]\n",
        "[" * 100_000,
        "{" * 100_000,
        "- " * 100_000,
        "!!python/object/apply:os.system ['touch ran']\n",
        "!!python/name:os.system\n",
        "schema: 1\n" + "x" * 10**6,
        "schema: " + "9" * 10**5,
        "? [a]\n: b\n",
        "\0",
    ],
    ids=["laughs", "circle", "list", "map", "items", "apply", "name", "word", "digits", "key", "zero"],
)
def test_yaml_attacks(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    assert outcome(lambda: load_recipe(str(tmp_path / "mine.yaml"))) != "right"
    assert not list(Path.cwd().glob("ran"))


def test_a_pipe_is_no_recipe(tmp_path):
    with pipe(tmp_path / "mine.yaml") as path:
        assert outcome(lambda: load_recipe(str(path))) != "right"


def test_recipes_that_extend_each_other(tmp_path):
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"schema: 1\nextends: {other}.yaml\n")
    assert "cannot extend itself" in outcome(lambda: load_recipe(str(tmp_path / "a.yaml")))


@given(key=st.text(max_size=30), value=st.text(max_size=30))
@FUZZ
def test_overrides(key, value):
    outcome(lambda: load_recipe("w4a4", [f"{key}={value}"]))


def test_plugins_that_nobody_named_do_not_run(tmp_path, monkeypatch):
    """Not from the current directory, and not because a data set or a recipe lies beside them."""
    flag = tmp_path / "ran"
    (tmp_path / "plugins").mkdir()
    for path in (tmp_path / "evil.py", tmp_path / "plugins" / "evil.py", tmp_path / "conftest.py"):
        path.write_text(f"import pathlib; pathlib.Path({str(flag)!r}).touch()\n")
    (tmp_path / "mine.yaml").write_bytes(BITS)
    monkeypatch.chdir(tmp_path)
    assert outcome(lambda: load_recipe("mine.yaml")) == "right"
    refused("inspect", "nothing", "--recipe", "mine.yaml")
    assert not flag.exists()


# --- the files of a run ---


@pytest.mark.parametrize("content", ["", "[", "[" * 10**6, "5", "null", '{"a": 1, "a": 2}'], ids=str.__len__)
def test_a_damaged_run_is_not_resumed(tmp_path, content):
    (tmp_path / RUN_FILE).write_text(content)
    assert outcome(lambda: resumes(tmp_path, {"model": "x"})) != "right"


def test_damaged_journals(tmp_path):
    path = tmp_path / JOURNAL_FILE
    whole = b"".join(json.dumps({"step": step, "loss": 1.5}).encode() + b"\n" for step in range(1, 6))

    @FUZZ
    @given(damaged(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        outcome(lambda: Journal(path).rewind(3, 3))

    check()
