"""The image tower against transformers' CLIP behind kornia's resize (testdata/make_image_tower.py), and its published size."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from motif_jax.config import ImageConfig
from motif_jax.interop.names import to_torch
from motif_jax.interop.tables import image
from motif_jax.models.image import ImageTower, preprocess
from motif_jax.models.networks import Network

TESTDATA = pathlib.Path(__file__).resolve().parents[1] / "testdata"
SPEC = importlib.util.spec_from_file_location("make_image_tower", TESTDATA / "make_image_tower.py")
SPEC.loader.exec_module(make := importlib.util.module_from_spec(SPEC))
CONFIG = ImageConfig(**make.SIZES)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def expected():
    with np.load(TESTDATA / "image_tower.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("size", [(24, 24), (40, 64), (20, 90), (16, 12)])
def test_preprocessing(size, expected, difference):
    """As it is, shrunk, shrunk along one axis only, enlarged."""
    found = preprocess(make.images(*size), CONFIG.size)
    assert difference(found[:, ::3], expected["preprocessed_{}x{}".format(*size)]) < TOLERANCE


def test_no_image_is_grey():
    np.testing.assert_allclose(
        preprocess(np.zeros((1, 30, 50, 3), np.float32), 8), preprocess(np.zeros((1, 8, 8, 3), np.float32), 8), atol=1e-6
    )


def test_tokens_before_pooling(expected, difference):
    network = Network.of(lambda rngs: ImageTower(CONFIG, rngs=rngs))
    tower = network.bind(jax.tree.map(np.asarray, image.to_jax(make.weights(), network.shapes)))
    with jax.default_matmul_precision("highest"):
        tokens = nnx.jit(lambda tower, x: tower(x))(tower, make.images(40, 64))
    assert tokens.shape == (2, 17, 32) and tokens.dtype == np.float32
    assert difference(tokens, expected["tokens"]) < TOLERANCE


def test_published_size():
    """ViT-H/14: 257 tokens of 1280; names and shapes are OpenCLIP's, the number of parameters is that of its image half."""
    network = Network.of(lambda rngs: ImageTower(ImageConfig(), rngs=rngs))
    assert sum(int(np.prod(leaf.shape)) for leaf in network.shapes.values()) == 632_076_800
    published = make.shapes(size=224, patch=14, width=1280, layers=32, heads=16, projection=1024)
    assert {name: tensor.shape for name, tensor in to_torch(network.shapes).items()} == published
    out = jax.eval_shape(lambda params, x: network.bind(params)(x), network.shapes, jax.ShapeDtypeStruct((2, 320, 512, 3), np.float32))
    assert out.shape == (2, 257, 1280)
