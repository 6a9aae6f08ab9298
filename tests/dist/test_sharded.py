"""Sharded equals unsharded, on eight fake devices: one process takes real train steps on every mesh, and the tests read its numbers."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from motif_jax.config import to_json

MESHES = ["(8, 1, 1, 1)", "(1, 8, 1, 1)", "(2, 2, 2, 1)", "(1, 2, 1, 4)"]  # data, fsdp, context, tensor
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tiny, quick_environment, tmp_path_factory):
    # Transformers in the middle block only, no dropout: compilation is nearly all that this costs.
    config = tiny(batch_size=8, unet={"attention_resolutions": [], "temporal_dropout": 0.0})
    towers = tiny(
        batch_size=8,
        backbone="dit",
        dit={"width": 16, "depth": 1, "num_head_channels": 8, "patch": [4, 2, 2]},
        autoencoder={"kind": "kl", "factor": 4, "z_channels": 4, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1},
        text={"kind": "openclip", "layers": 2, "heads": 2},
    )
    # Compilation is nearly all that this costs, and no sum's order that matters changes.
    environment = os.environ | quick_environment(8)
    script = pathlib.Path(__file__).with_name("sharded.py")
    command = [sys.executable, script, to_json(config), to_json(towers), tmp_path_factory.mktemp("eight")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradient_are_those_of_one_device(found, mesh):
    assert found[mesh]["loss"] < 1e-5
    assert found[mesh]["gradient"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_the_step_compiles_once(found, mesh):
    assert found[mesh]["compilations"] == 1


def test_a_device_holds_its_part_of_the_parameters(found):
    """Of the elements of all kernels; axes that do not divide a kernel leave it whole, hence a little more than 1 / (fsdp * tensor)."""
    shares = [found[mesh]["local"] for mesh in MESHES]
    assert shares[0] == 1.0 and shares[1] < 0.2 and shares[2] < 0.6 and shares[3] < 0.2


def test_evaluation_and_sampling_are_those_of_one_device(found):
    """With frozen networks that have parameters, each of which a device holds its part of; the train step is not compiled again."""
    towers = found["towers"]
    assert towers["evaluation"] < 1e-5 and towers["loss"] < 1e-5
    assert towers["clips"] < 0.01 < 1 < towers["contrast"]  # grey levels: roundings that fall on the other side are rare
    assert all(share < 0.6 for share in towers["local"].values())  # fsdp=2
    assert towers["compilations"] == [1, 1, 1]


def test_resuming_on_eight_devices_is_exact(found):
    assert found["resumed"] == {"metrics": True, "state": True}


def test_a_checkpoint_moves_to_four_devices_and_to_one(found):
    assert found["four"]["state"] and found["one"]["state"]
    assert found["one"]["loss"] < 1e-5
