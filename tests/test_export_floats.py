"""What runs in float is named by its module, with the plan's reason, or none where it fell back."""

import pytest
from family_models import SIZE, ready

from qdetr_cli.export.floats import explained
from qdetr_cli.export.kernels import Kernels, Operation
from qdetr_cli.export.onnx_graph import marked
from qdetr_cli.export.program import exported
from qdetr_cli.plan import Plan
from qdetr_cli.tables import float_lines


@pytest.fixture(scope="module")
def plan() -> Plan:
    return ready("detr", "w8a8").plan


def operation(name: str, kind: str = "linear", *, integer: bool = False) -> Operation:
    return Operation(name=name, kind=kind, integer=integer, kernel="Gemm")


def reasons(plan: Plan | None, *operations: Operation) -> list[tuple[str, str]]:
    kernels = Kernels(runtime="onnxruntime", operations=operations)
    return [(each.path, each.reason) for each in explained(kernels, plan)]


@pytest.mark.parametrize(
    ("name", "path", "call"),
    [
        ("model.encoder.layers.0.fc1:linear", "model.encoder.layers.0.fc1", 0),
        ("bbox_predictor.layers.2:linear:1", "bbox_predictor.layers.2", 1),
        ("a.0:linear.bias", "a.0", 0),
        ("a.self_attn:product:3", "a.self_attn", 3),
        ("node_linear_6", None, 0),
    ],
)
def test_a_name_says_the_module_and_which_call_it_is(name, path, call):
    assert (operation(name).path, operation(name).call) == (path, call)


def test_what_the_recipe_keeps_float_is_said_with_its_rule(plan):
    ((path, reason),) = reasons(
        plan,
        operation("bbox_predictor.layers.2:linear"),
        operation("bbox_predictor.layers.1:linear", integer=True),
    )
    assert path == "bbox_predictor.layers.2"
    assert reason.startswith("kept float by rules.")


def test_what_is_planned_in_integers_has_no_reason_to_be_float(plan):
    attention = "model.decoder.layers.0.encoder_attn"
    found = reasons(
        plan,
        operation("bbox_predictor.layers.1:linear"),
        operation(f"{attention}:product", "product"),
        operation(f"{attention}:product:1", "product"),
        operation("node_matmul", "product"),
    )
    assert [reason for _, reason in found[:3]] == ["", "", ""]
    assert found[3] == ("node_matmul", "no rule can name it: it is no layer and no attention")


def test_a_product_is_float_where_one_of_its_own_slots_is(plan):
    attention = next(each for each in plan.modules if each.op == "attention")
    content = plan.to_dict()
    (module,) = [each for each in content["modules"] if each["path"] == attention.path]
    (slot,) = [each for each in module["slots"] if each["slot"] == "v"]
    slot |= {"format": None, "rule": "rules.9"}
    names = (f"{attention.path}:product", f"{attention.path}:product:1")
    found = reasons(Plan.from_dict(content), *(operation(name, "product") for name in names))
    assert [reason for _, reason in found] == ["", "its v stays float (rules.9)"]


def test_a_float_model_says_so():
    assert reasons(None, operation("a:linear")) == [("a", "a float model")]


def test_lines_group_modules_by_reason(plan):
    kernels = Kernels(
        runtime="onnxruntime",
        operations=tuple(
            operation(f"{path}:linear")
            for path in ("bbox_predictor.layers.2", "bbox_predictor.layers.1", "bbox_predictor.layers.0")
        ),
    )
    kept, fallen = float_lines(explained(kernels, plan))
    assert kept.startswith("in float, kept float by rules.")
    assert kept.endswith(": bbox_predictor.layers.2")
    assert fallen == (
        "in float, although it is planned in integers: bbox_predictor.layers.1, bbox_predictor.layers.0"
    )


def test_the_layers_of_a_graph_are_named_after_their_modules():
    graph = marked(exported(ready("detr", "w8a8").model.eval(), SIZE)).model.graph
    names = {node.name for node in graph}
    assert {"model.encoder.layers.0.mlp.fc1:linear", "class_labels_classifier:linear"} <= names
    assert {f"model.encoder.layers.0.self_attn:product{call}" for call in ("", ":1")} <= names
    assert "model.input_projection:convolution" in names
