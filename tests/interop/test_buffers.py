"""Schedule tables of exported checkpoints against those of the reference's own."""

import json

import numpy as np
import pytest

from motif_jax.config import DiffusionConfig
from motif_jax.interop.buffers import schedule_buffers
from motif_jax.interop.reference import VIDEOCRAFTER


def test_names_shapes_and_values(shared):
    golden = shared / "golden/videocrafter2"
    found, tables = schedule_buffers(VIDEOCRAFTER), np.load(golden / "ddim_tiny.npz")
    listed = json.loads((golden / "model_tiny_keys.json").read_text())
    networks = ("model.", "first_stage_model.", "cond_stage_model.")
    expected = {name: tuple(shape) for name, (shape, _) in listed.items() if not name.startswith(networks)}
    assert {name: table.shape for name, table in found.items()} == expected
    for name, table in found.items():
        if f"vc_buffer/{name}" in tables:  # all but one
            # One unit in the last place of float32: linspace and roots may round differently.
            np.testing.assert_allclose(table, tables[f"vc_buffer/{name}"], rtol=1.2e-7, err_msg=name)
    np.testing.assert_allclose(found["log_one_minus_alphas_cumprod"], 2 * np.log(found["sqrt_one_minus_alphas_cumprod"]), rtol=1e-4)


def test_what_has_no_tables():
    assert "scale_arr" not in schedule_buffers(DiffusionConfig(prediction="eps", zero_terminal_snr=False))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedule_buffers(DiffusionConfig())
