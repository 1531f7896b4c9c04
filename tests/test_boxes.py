"""Boxes against torchvision, by hand, and at the edges."""

import pytest
import torch
from torchvision import ops

from qdetr_cli.boxes import cxcywh_to_xyxy, giou, iou, xyxy_to_cxcywh


def _corners(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat(
        (low, low + 0.01 + torch.rand(count, 2, generator=generator, dtype=torch.float64)), dim=-1
    )


def test_conversions_by_hand():
    corners = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    centers = torch.tensor([[20.0, 40.0, 20.0, 40.0]])
    assert torch.equal(xyxy_to_cxcywh(corners), centers)
    assert torch.equal(cxcywh_to_xyxy(centers), corners)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (7, 4), (2, 3, 4)], ids=str)
def test_round_trip_is_exact_on_whole_pixels(shape):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 4000, shape, generator=generator).float()
    assert torch.equal(cxcywh_to_xyxy(xyxy_to_cxcywh(corners)), corners)


def test_all_pairs_match_torchvision():
    a, b = _corners(9, 0), _corners(5, 1)
    torch.testing.assert_close(giou(a[:, None], b[None]), ops.generalized_box_iou(a, b))
    torch.testing.assert_close(iou(a[:, None], b[None]), ops.box_iou(a, b))


def test_giou_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor([[4.0, 0.0, 6.0, 2.0]])  # hull 12, union 8, nothing shared
    assert giou(a, b).item() == pytest.approx(-4 / 12)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]),
        ([0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.2, 0.2]),
        ([0.2, 0.2, 0.2, 0.9], [0.2, 0.2, 0.2, 0.9]),
    ],
    ids=["a point", "turned over", "a line"],
)
def test_boxes_without_area_give_finite_values_and_gradients(a, b):
    left, right = torch.tensor([a], requires_grad=True), torch.tensor([b])
    value = giou(left, right)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(left.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    a = torch.tensor([[0.001, 0.001, 0.003, 0.003]], dtype=dtype)
    assert giou(a, a).dtype == torch.float32
    assert giou(a, a).item() == 1.0


def test_no_boxes():
    for measure in (iou, giou):
        assert measure(torch.zeros(0, 1, 4), torch.zeros(1, 3, 4)).shape == (0, 3)
