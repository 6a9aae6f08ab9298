"""A configuration for whole runs, and its data."""

import dataclasses

import pytest


@pytest.fixture(scope="session")
def eventful(tiny, tmp_path_factory):
    """Four steps with everything on."""
    from motif_jax import preparation
    from motif_jax.config import MeshConfig

    small = tiny(
        backbone="dit",
        dit={"width": 16, "depth": 1, "num_head_channels": 8, "patch": [4, 2, 2]},
        prepare={"validation_share": 0.3},
        checkpoint={"every": 2, "keep": 9},
        eval={"every": 2, "batches": 2, "buckets": 1},
        sample={"every": 2, "count": 1, "steps": 1},
    )
    data = tmp_path_factory.mktemp("data")
    preparation.prepare(small, "synthetic:shapes:40", data, log=lambda line: None)
    return dataclasses.replace(small, data=dataclasses.replace(small.data, path=str(data)), mesh=MeshConfig())
