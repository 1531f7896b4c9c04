"""The export of PP-DocLayout, for a fixed number of images: it counts them."""

import pytest
from exported_families import check_export


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp_doclayout_v2", "pp_doclayout_v3"])
def test_it_computes_what_the_fake_quant_model_computes(name):
    check_export(name, mask=False, batch=2)
