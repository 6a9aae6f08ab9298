"""Our train step against the same step in PyTorch: network, motion focal loss, AdamW, averaged weights.

    python benchmarks/train_step.py [--config=configs/motif.py:tiny --config=configs/motif.py:small] [--rounds=10] [--compile]

Both sides start from latents, text embeddings and flow in memory, draw noise and timesteps, and end with new weights. Weights are
equal and the outputs are compared before anything is timed. Without a GPU both compute in float32 on all cores.
"""

import argparse
import copy

import jax
import numpy as np
import torch
from side_by_side import alternate, load_config, machine, random_params, torch_twin

from motif_jax.config import Config
from motif_jax.diffusion.schedule import make_schedule
from motif_jax.models.networks import Networks
from motif_jax.training import state as train_state
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import make_train_step


def make_batch(config: Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    d, z, clips = config.data, config.autoencoder.z_channels, config.batch_size
    grid = (clips, d.frames, config.latent_height, config.latent_width)
    mean = rng.normal(size=(*grid, z)).astype(np.float16)
    return {
        "latent_moments": np.concatenate([mean, np.full_like(mean, -30.0)], -1),
        "text_embedding": rng.normal(size=(clips, config.text.context_length, config.text.width)).astype(np.float16),
        "flow": rng.normal(0, 20, (*grid, 2)).astype(np.float16),
        "fps": np.full(clips, 8.0, np.float32),
    }


class TorchStep:
    """v-prediction with the image on all frames, the paper's heatmap and loss, AdamW, averaged weights (float32)."""

    def __init__(self, config: Config, unet: torch.nn.Module, batch: dict[str, np.ndarray], compiled: bool) -> None:
        self.config, self.unet = config, unet.train()
        o = config.optimizer
        self.average = copy.deepcopy(list(unet.parameters()))
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=config.learning_rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, foreach=True
        )
        d = config.diffusion
        schedule = make_schedule(d.num_timesteps, d.beta_start, d.beta_end, d.zero_terminal_snr, d.base_scale)
        self.alpha, self.sigma = (
            torch.from_numpy(np.array(a)) for a in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        z = config.autoencoder.z_channels
        latents = config.autoencoder.scale_factor * batch["latent_moments"][..., :z].astype(np.float32)
        self.z = torch.from_numpy(np.ascontiguousarray(np.moveaxis(latents, -1, 1)))
        self.flow = torch.from_numpy(batch["flow"].astype(np.float32))
        self.text, self.fps = (torch.from_numpy(batch[k].astype(np.float32)) for k in ("text_embedding", "fps"))
        self.forward = torch.compile(unet) if compiled else unet

    def __call__(self) -> None:
        config, z = self.config, self.z
        t = torch.randint(0, config.diffusion.num_timesteps, (len(z),))
        alpha, sigma = (a[t][:, None, None, None, None] for a in (self.alpha, self.sigma))
        noise = torch.randn_like(z)
        x = torch.cat([alpha * z + sigma * noise, z[:, :, :1].expand_as(z)], 1)
        keep = torch.rand(len(z), 1, 1) >= config.condition.text_drop
        residual = alpha * noise - sigma * z - self.forward(x, t, self.text * keep, self.fps)
        intensity = self.flow.norm(dim=-1) / np.hypot(config.data.height, config.data.width)
        m = torch.sigmoid(config.loss.sharpness * (intensity - config.loss.threshold))[:, None]
        loss = (residual**2).mean() + config.loss.motion_weight * ((m * residual) ** 2).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.unet.parameters()), 1 - config.ema.decay)
        loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help="repeat for several")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--compile", action="store_true", help="torch.compile the PyTorch network")
    arguments = parser.parse_args()
    print(machine())
    rows = ["| configuration | clips | ours, s | PyTorch, s | PyTorch / ours |", "|---|---|---|---|---|"]
    for name in arguments.config or ["configs/motif.py:tiny", "configs/motif.py:small"]:
        config = load_config(name)
        networks, optimizer = Networks.of(config), make_optimizer(config)
        params, batch = random_params(networks), make_batch(config)
        theirs = TorchStep(config, torch_twin(config, networks, params), batch, arguments.compile)
        empty = np.zeros(config.text.context_length, np.int32)
        step = jax.jit(make_train_step(networks, optimizer, empty), donate_argnums=0)
        frozen = networks.init_frozen()
        on_device = jax.device_put(batch)
        carry = [jax.jit(lambda p, optimizer=optimizer: train_state.create(p, optimizer, True))(params)]

        def ours(step=step, carry=carry, frozen=frozen, on_device=on_device) -> None:
            carry[0], metrics = step(carry[0], frozen, on_device)
            float(metrics["loss"])

        a, b = alternate(ours, theirs, arguments.rounds)
        rows.append(f"| {name} | {config.batch_size} | {a:.3f} | {b:.3f} | {b / a:.2f} |")
        print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
