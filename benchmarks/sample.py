"""Seconds per video: our sampler against DDIM in PyTorch with the same weights, steps and guidance.

    python benchmarks/sample.py [--config=configs/motif.py:tiny] [--steps=10] [--rounds=3] [--compile]
    python benchmarks/sample.py --config=configs/motif.py --steps=50 --compile          # on a GPU

Both sides run the network on text and no text in one batch, with the first frame's latent in memory, and end with latents on
the host. In float32 the two results from the same noise are compared before anything is timed; with dtype=bfloat16, where PyTorch
works under autocast, their difference is printed. On a GPU cuDNN tries its kernels, as XLA does, and float32 is float32 on both sides.
"""

import argparse
import os
import threading

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card is shared

import jax
import kernels
import numpy as np
import torch
from common import random_weights, run
from side_by_side import alternate, machine, torch_twin, torch_unet

from motif_jax.config import load_config
from motif_jax.diffusion import samplers
from motif_jax.diffusion.guidance import classifier_free
from motif_jax.models.networks import Networks, image_condition
from motif_jax.training.step import diffusion_schedule

LIMIT = 1e-3  # relative L2 of the two videos; differences of 1e-6 a step grow along the trajectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/motif.py:tiny")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the PyTorch network")
    parser.add_argument("--profile", help="on a GPU: directory for a trace of one of our videos, of which kernels.py says what it took")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    networks = Networks.of(config)
    params = random_weights(networks.denoiser.shapes)
    exact, device = config.dtype == "float32", "cuda" if torch.cuda.is_available() else "cpu"
    theirs = (torch_twin(config, networks, params) if exact else torch_unet(config, params)).to(device)
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = not exact, True
    jax.config.update("jax_default_matmul_precision", "highest" if exact else None)
    schedule, guidance = diffusion_schedule(config), config.sample.guidance
    steps = samplers.ddim_timesteps(config.diffusion.num_timesteps, arguments.steps, "trailing")
    rng = np.random.default_rng(2)
    z, frames = config.autoencoder.z_channels, config.data.frames
    grid = (config.latent_height, config.latent_width)
    noise = rng.normal(size=(1, frames, *grid, z)).astype(np.float32)
    first = rng.normal(size=(1, *grid, z)).astype(np.float32)
    text = rng.normal(size=(2, config.text.context_length, config.text.width)).astype(np.float32)  # with and without a sentence
    fps = np.full(2, 8.0, np.float32)

    @jax.jit
    def generate(params, noise, first, text, fps):
        params = networks.denoiser.cast(params)
        image = jax.numpy.repeat(image_condition(first, frames, "repeat"), 2, 0)

        def denoise(x, t):
            both = networks.denoise(params, jax.numpy.repeat(x, 2, 0), jax.numpy.repeat(t, 2), text, fps, image)
            return classifier_free(both[:1], both[1:], guidance, 0.0)

        return samplers.ddim(denoise, schedule, noise, steps, config.diffusion.prediction, 0.0)

    alphas, scale = (np.asarray(table, np.float64) for table in (schedule.sqrt_alphas_cumprod, schedule.scale))
    text_torch, fps_torch = torch.from_numpy(text).to(device), torch.from_numpy(fps).to(device)
    image_torch = torch.from_numpy(np.moveaxis(first, -1, 1).copy()).to(device)[:, :, None].expand(-1, -1, frames, -1, -1)
    network = torch.compile(theirs) if arguments.compile else theirs

    @torch.no_grad()
    @torch.autocast(device, torch.bfloat16, enabled=not exact)  # around all steps: weights are cast once
    def generate_torch() -> np.ndarray:
        x = torch.from_numpy(np.moveaxis(noise, -1, 1).copy()).to(device)
        for i, t in reversed(list(enumerate(steps))):
            batch = torch.cat([x, image_torch], 1).repeat(2, 1, 1, 1, 1)
            v, v_null = network(batch, torch.full((2,), int(t), device=device), text_torch, fps_torch).float().chunk(2)
            v = v_null + guidance * (v - v_null)
            a = float(alphas[t])
            x0, eps = a * x - (1 - a * a) ** 0.5 * v, a * v + (1 - a * a) ** 0.5 * x
            after = float(alphas[steps[i - 1] if i else 0])  # ends at the first timestep, as the reference does
            x0 *= float((scale[steps[i - 1]] if i else 1.0) / scale[t])
            x = after * x0 + (1 - after * after) ** 0.5 * eps
        return np.moveaxis(x.cpu().numpy(), 1, -1)

    inputs = jax.device_put((params, noise, first, text, fps))
    made = []
    compiling = threading.Thread(target=lambda: made.append(generate.lower(*inputs).compile()))
    compiling.start()
    want = generate_torch()
    compiling.join()

    def ours() -> np.ndarray:
        return np.asarray(made[0](*inputs))

    found = ours()
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    print(f"{machine()}\nthe two videos differ by {error:.1e} (relative L2)", flush=True)
    if exact and not error <= LIMIT:
        raise SystemExit(f"more than {LIMIT:g}: nothing was timed")
    a, b = alternate(ours, generate_torch, arguments.rounds)
    way = "torch.compile" if arguments.compile else "eager"
    print("| configuration | DDIM steps | ours, s per video | PyTorch, s | PyTorch / ours | PyTorch's way |\n|---|---|---|---|---|---|")
    print(f"| {arguments.config}, {config.dtype} | {len(steps)} | {a:.2f} | {b:.2f} | {b / a:.2f} | {way} |", flush=True)
    if arguments.profile:
        print(kernels.profiled(ours, 1, arguments.profile))


if __name__ == "__main__":
    run(main)
