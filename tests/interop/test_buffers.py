"""Schedule tables of exported checkpoints against those of the reference's own."""

import json

import numpy as np
import pytest

from motif_jax.config import DiffusionConfig
from motif_jax.interop.buffers import schedule_buffers
from motif_jax.interop.reference import DYNAMICRAFTER, VIDEOCRAFTER


@pytest.mark.parametrize(("config", "golden", "prefix"), [(VIDEOCRAFTER, "ddim_tiny", "vc"), (DYNAMICRAFTER, "ddim_v_tiny", "dc")])
def test_names_shapes_and_values(shared, config, golden, prefix):
    found, tables = schedule_buffers(config), np.load(shared / f"golden/videocrafter2/{golden}.npz")
    listed = json.loads((shared / "golden/videocrafter2/model_tiny_keys.json").read_text())
    networks = ("model.", "first_stage_model.", "cond_stage_model.")
    expected = {name: tuple(shape) for name, (shape, _) in listed.items() if not name.startswith(networks)}
    assert {name: table.shape for name, table in found.items()} == expected
    for name, table in found.items():
        assert np.isfinite(table).all(), name
        if f"{prefix}_buffer/{name}" in tables:  # all but one of VideoCrafter's
            # One unit in the last place of float32: linspace and roots may round differently.
            np.testing.assert_allclose(table, tables[f"{prefix}_buffer/{name}"], rtol=1.2e-7, err_msg=name)
    np.testing.assert_allclose(found["log_one_minus_alphas_cumprod"], np.log1p(-found["alphas_cumprod"]), rtol=1e-4)


def test_what_has_no_tables():
    assert "scale_arr" not in schedule_buffers(DiffusionConfig(prediction="eps", zero_terminal_snr=False))
    assert not schedule_buffers(DiffusionConfig(prediction="flow"))
    zero = schedule_buffers(DYNAMICRAFTER)  # a network that predicts v has no use for reciprocals
    assert not zero["sqrt_recip_alphas_cumprod"].any() and not zero["sqrt_recipm1_alphas_cumprod"].any()
