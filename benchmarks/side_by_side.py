"""Ours and PyTorch's U-Net with equal weights, and timing that alternates between two sides."""

import datetime
import inspect
import platform
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from common import cores
from torch_unet import UNet

from motif_jax.config import Config
from motif_jax.interop.names import to_torch
from motif_jax.models.networks import Networks, Params

LIMIT = 1e-5  # relative L2 between the two networks before anything is timed; float32 sums in another order reach some 1e-6


def torch_unet(config: Config, params: Params) -> UNet:
    """The PyTorch network of a configuration with our weights."""
    unet = config.unet
    given = {name: getattr(unet, name) for name in inspect.signature(UNet).parameters if hasattr(unet, name)}
    with torch.device("meta"):
        theirs = UNet(**given)
    theirs.load_state_dict({name: torch.from_numpy(np.array(t)) for name, t in to_torch(params).items()}, strict=True, assign=True)
    return theirs.eval()


def torch_twin(config: Config, networks: Networks, params: Params) -> UNet:
    """`torch_unet` after a check that both put out the same. Exits on a difference."""
    unet, theirs = config.unet, torch_unet(config, params)
    rng = np.random.default_rng(1)
    frames, latent = config.data.frames, (config.latent_height, config.latent_width)
    x = rng.normal(size=(1, frames, *latent, unet.in_channels)).astype(np.float32)
    context = rng.normal(size=(1, config.text.context_length, unet.context_dim)).astype(np.float32)
    t, fps = np.array([500]), np.array([8.0], np.float32)
    with torch.no_grad():
        want = theirs(*map(torch.from_numpy, (np.ascontiguousarray(np.moveaxis(x, -1, 1)), t, context, fps))).numpy()
    z = unet.out_channels
    with jax.default_matmul_precision("highest"):
        found = np.asarray(jax.jit(networks.denoise)(params, x[..., :z], t, context, fps, x[..., z:]))
    error = np.linalg.norm(found - np.moveaxis(want, 1, -1)) / np.linalg.norm(want)
    if not error <= LIMIT:
        sys.exit(f"the two networks differ by {error:.1e} (relative L2), more than {LIMIT:g}: nothing was timed")
    print(f"equal weights, outputs differ by {error:.1e} (relative L2)")
    return theirs


def alternate(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of each, run by turns after two runs of warm-up, so that a busy machine slows both."""
    times = ([], [])
    for i in range(-2, rounds):
        for action, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            action()
            if i >= 0:
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def machine() -> str:
    """One line: where and with what."""
    device = jax.devices()[0]
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    return f"{device.device_kind}, {cores()} cores, {platform.platform()}, {versions}, {datetime.date.today()}"
