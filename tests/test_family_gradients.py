"""What the training of each family reaches: every weight, step and head, but for a list that says why not."""

import copy
import re

import pytest
import torch
from family_models import FAMILIES, batch, ready, set_mode
from torch import nn

from qdetr_cli.families import family_of
from qdetr_cli.losses import detection_loss

ZERO_QUERIES = r"model\.decoder\.layers\.0\.self_attn\."  # what enters the first decoder layer is zeros
UNTAUGHT = {  # name -> pattern of what no loss can teach
    "detr": ZERO_QUERIES + r"v_proj\.",
    "conditional_detr": ZERO_QUERIES + r"(q_content|k_content|v)_proj\.",
    "dab-detr": ZERO_QUERIES + r"self_attn_(query_content|key_content|value)_proj\.",
    "table-transformer": r"model\.decoder\.layers\.0\.self_attn_layer_norm\.weight",
    "d_fine": r"model\.decoder\.(reg_scale|up)$",  # constants of the integral
    "deimv2": r"model\.decoder\.(reg_scale|up)$",
    "rf_detr": r"model\.backbone\.backbone\.embeddings\.mask_token",  # of the backbone's pretraining
    # transformers has no loss for the encoder's proposals here
    "deformable_detr, two-stage": r"model\.(enc_output|decoder\.(class|bbox)_embed\.2\.)",
}


def learn(name: str) -> nn.Module:
    """The fake-quant model after one backward pass in training, denoising and auxiliary losses included."""
    model = copy.deepcopy(ready(name, "w4a4").model)
    set_mode(model, True)
    torch.manual_seed(0)
    detection_loss(model, family_of(model), batch(), auxiliary=True).total.backward()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_and_every_step_is_taught(name: str) -> None:
    """Offsets may rest: one has a gradient only where a value is clipped."""
    idle = {key for key, each in learn(name).named_parameters() if each.grad is None or not each.grad.any()}
    listed = re.compile(UNTAUGHT.get(name, "nothing at all"))
    assert not [key for key in idle if not listed.match(key) and not key.endswith("quantizer.offset")]
    assert name not in UNTAUGHT or any(listed.match(key) for key in idle), "the list is out of date"
