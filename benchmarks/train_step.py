"""Our train step against the same step in PyTorch: network, motion focal loss, AdamW, averaged weights.

    python benchmarks/train_step.py [--config=configs/motif.py:tiny --config=configs/motif.py:small] [--rounds=10] [--compile]
    python benchmarks/train_step.py --config=configs/motif.py --batch=1 --remat=dots --compile       # on a GPU of 80 GB

Both sides start from latents, text embeddings and flow in memory, draw noise and timesteps, and end with new weights. Weights are
equal and the outputs are compared before anything is timed. Without a GPU both compute in float32 on all cores, by turns.

On a GPU each side has the card for itself while it is timed: PyTorch's ways run in a process of their own each, first eager, then compiled
(with --compile=only that alone), which compiles while we compile and takes its steps when both are done; then come ours. Steps follow one
another as in training, which waits for a result now and then: each time is that of five steps. With dtype=bfloat16 PyTorch works under
autocast, with fused AdamW and scaled_dot_product_attention; cuDNN tries its kernels, as XLA does. What is not compiled after --limit
seconds is left out; exits with 1 when that is our step, or all of PyTorch's. Outputs are not compared there. Of the paper's network eager
PyTorch keeps 27 GiB of a clip beside 29 of state (counted, not measured), so that two clips need more than 80 GB; with --budget
torch.compile recomputes what is cheap, as our remat=dots does.
"""

import argparse
import copy
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card is shared

import jax
import kernels
import numpy as np
import torch
import torch._functorch.config
from common import random_weights, run
from side_by_side import alternate, machine, torch_twin, torch_unet

from motif_jax.config import Config, load_config
from motif_jax.dist import startup
from motif_jax.models.networks import Networks, Params
from motif_jax.training import state as train_state
from motif_jax.training.flops import peak_tflops, training_flops
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import diffusion_schedule, make_train_step


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
    """v-prediction with the image on all frames, the paper's heatmap and loss, AdamW, averaged weights; parameters in float32."""

    def __init__(self, config: Config, unet: torch.nn.Module, batch: dict[str, np.ndarray], compiled: bool, device: str = "cpu") -> None:
        self.config, self.unet, self.device = config, unet.to(device).train(), device
        o = config.optimizer
        self.average = copy.deepcopy(list(unet.parameters()))
        kind = {"fused": True} if device == "cuda" else {"foreach": True}
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=config.learning_rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, **kind
        )
        schedule, z = diffusion_schedule(config), config.autoencoder.z_channels
        latents = config.autoencoder.scale_factor * batch["latent_moments"][..., :z].astype(np.float32)
        tables = tuple(np.array(table) for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod, schedule.scale))
        arrays = (*tables, np.ascontiguousarray(np.moveaxis(latents, -1, 1)))
        arrays += tuple(batch[k].astype(np.float32) for k in ("flow", "text_embedding", "fps"))
        self.alpha, self.sigma, self.scale, self.z, self.flow, self.text, self.fps = (torch.from_numpy(a).to(device) for a in arrays)
        self.forward = torch.compile(unet) if compiled else unet

    def __call__(self) -> torch.Tensor:
        """Starts a step; its loss, which has to be waited for."""
        config, z = self.config, self.z
        t = torch.randint(0, config.diffusion.num_timesteps, (len(z),), device=self.device)
        alpha, sigma, scale = (a[t][:, None, None, None, None] for a in (self.alpha, self.sigma, self.scale))
        noise, clean = torch.randn_like(z), scale * z
        x = torch.cat([alpha * clean + sigma * noise, z[:, :, :1].expand_as(z)], 1)
        keep = torch.rand(len(z), 1, 1, device=self.device) >= config.condition.text_drop
        with torch.autocast(self.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            output = self.forward(x, t, self.text * keep, self.fps).float()
        residual = alpha * noise - sigma * clean - output
        intensity = self.flow.norm(dim=-1) / np.hypot(config.data.height, config.data.width)
        m = torch.sigmoid(config.loss.sharpness * (intensity - config.loss.threshold))[:, None]
        loss = (residual**2).mean() + config.loss.motion_weight * ((m * residual) ** 2).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.unet.parameters()), 1 - config.ema.decay)
        return loss.detach()


class OurStep:
    """The train step of the training loop, compiled when it is made; `start` gives it weights."""

    def __init__(self, config: Config, networks: Networks, batch: dict[str, np.ndarray]) -> None:
        self.networks, self.optimizer = networks, make_optimizer(config)
        step = make_train_step(networks, self.optimizer)
        shapes = jax.eval_shape(self._create, networks.denoiser.shapes)
        frozen = {name: network.shapes for name, network in networks.frozen.items()}
        frozen["unconditional"] = jax.eval_shape(networks.unconditional, frozen, np.zeros(config.text.context_length, np.int32))
        self.batch = batch
        self.step = jax.jit(step, donate_argnums=0).lower(shapes, frozen, batch).compile()

    def _create(self, params: Params) -> train_state.TrainState:
        return train_state.create(params, self.optimizer, True)

    def start(self, params: Params) -> None:
        self.state = jax.jit(self._create, donate_argnums=0)(jax.device_put(params))
        # Towers that need a file stand at zero: what they put out is of no consequence here.
        frozen = {name: {k: np.zeros(s.shape, s.dtype) for k, s in n.shapes.items()} for name, n in self.networks.frozen.items()}
        frozen = self.networks.with_unconditional(frozen, lambda _: np.zeros((1, self.networks.config.text.context_length)))
        self.frozen, self.batch = jax.device_put((frozen, self.batch))

    def __call__(self) -> jax.Array:
        """Starts a step; its loss, which has to be waited for."""
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        return metrics["loss"]


def median_seconds(step, rounds: int, steps: int = 5) -> float:
    """Of a step, over `rounds` times `steps` of them on end."""
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(steps):
            loss = step()
        float(loss)
        taken.append((time.perf_counter() - began) / steps)
    return statistics.median(taken[1:])


def torch_side(config: Config, arguments: argparse.Namespace) -> None:
    """The process of PyTorch: says "ready" after a first step, waits for a line, says seconds and GiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    compiled = arguments.side == "torch.compile"
    if arguments.budget is not None:
        torch._functorch.config.activation_memory_budget = arguments.budget
    step = TorchStep(config, torch_unet(config, random_weights(Networks.of(config).denoiser.shapes)), make_batch(config), compiled, device)
    float(step())
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = median_seconds(step, arguments.rounds)
    print(seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0, flush=True)


def apart(name: str, config: Config, arguments: argparse.Namespace) -> None:
    """Prints a row for each of PyTorch's ways, each side with the card to itself; whatever is not ready in time is left out."""
    began = time.perf_counter()
    networks, made, found = Networks.of(config), [], {}
    given = [
        f"--{key}={value}" for key, value in vars(arguments).items() if key in ("rounds", "batch", "remat", "budget") and value is not None
    ]

    def left() -> float:
        return max(1.0, arguments.limit - (time.perf_counter() - began))

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s: {text}", flush=True)

    def make() -> None:
        made.append(OurStep(config, networks, make_batch(config)))
        memory = made[0].step.memory_analysis()
        say(f"our step is compiled, needs {(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30:.1f} GiB")

    def time_pytorch(way: str) -> None:
        command = [sys.executable, __file__, f"--side={way}", f"--config={name}", *given]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        timer = threading.Timer(left(), process.kill)
        timer.start()
        ready = process.stdout.readline() == "ready\n"
        timer.cancel()
        if ready:
            say(f"PyTorch ({way}) is ready")
            if compiling.ident:  # XLA tries kernels on the card
                compiling.join(left())
        said, _ = process.communicate("go\n")
        if process.returncode:
            late = f", not ready in {arguments.limit:g} s" if process.returncode == -signal.SIGKILL else ""
            say(f"PyTorch ({way}) is left out: it ended with status {process.returncode}{late}")
            return
        found[way], gib = map(float, said.split())
        say(f"PyTorch ({way}): {found[way]:.3f} s a step, {gib:.1f} GiB at most")

    compiling = threading.Thread(target=make, daemon=True)
    if arguments.compile != "only":
        time_pytorch("eager")
    compiling.start()
    if arguments.compile:
        time_pytorch("torch.compile")
    compiling.join(left())
    if not made:
        say("our step is not compiled; it is left out")
        sys.stdout.flush()
        os._exit(1)  # XLA cannot be interrupted
    made[0].start(random_weights(networks.denoiser.shapes))
    seconds = median_seconds(made[0], arguments.rounds)
    rate = training_flops(config) / seconds / 1e12
    say(f"ours: {seconds:.3f} s a step, {rate:.1f} model TFLOP/s, peak of the device {peak_tflops(jax.devices()[0].device_kind)}")
    for way, theirs in found.items():
        budget = "" if arguments.budget is None or way == "eager" else f", budget {arguments.budget:g}"
        print(row(name, config, seconds, theirs, way + budget), flush=True)
    if arguments.profile:
        print(kernels.profiled(lambda: float(made[0]()), 3, arguments.profile), flush=True)
    if not found:
        sys.exit("PyTorch has no time: nothing to compare with")


def row(name: str, config: Config, ours: float, theirs: float, way: str) -> str:
    cells = (
        f"{name}, {config.dtype}, remat {config.remat}",
        f"{config.batch_size}",
        f"{ours:.3f}",
        f"{theirs:.3f}",
        f"{theirs / ours:.2f}",
    )
    return f"| {' | '.join(cells)} | {way} |"


def by_turns(name: str, config: Config, arguments: argparse.Namespace) -> None:
    """Prints the row of both sides in one process, by turns, after a comparison of the outputs."""
    networks = Networks.of(config)
    params, batch = random_weights(networks.denoiser.shapes), make_batch(config)
    theirs = TorchStep(config, torch_twin(config, networks, params), batch, arguments.compile)
    began = time.perf_counter()
    ours = OurStep(config, networks, batch)
    print(f"our step was compiled, or read from the compile cache, in {time.perf_counter() - began:.0f} s", flush=True)
    ours.start(params)
    seconds = alternate(lambda: float(ours()), lambda: float(theirs()), arguments.rounds)
    print(row(name, config, *seconds, "torch.compile" if arguments.compile else "eager"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help="repeat for several")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each side; on a GPU, of five each")
    parser.add_argument("--compile", nargs="?", const="also", choices=("also", "only"), help="torch.compile the PyTorch network")
    parser.add_argument("--profile", help="on a GPU: directory for a trace of three of our steps, of which kernels.py says what they did")
    parser.add_argument("--batch", type=int, help="clips, in place of the configuration's")
    parser.add_argument(
        "--remat",
        choices=("none", "block", "convs", "dots"),
        help="in place of the configuration's; PyTorch keeps all activations (or --budget)",
    )
    parser.add_argument(
        "--budget", type=float, help="on a GPU: torch.compile's activation_memory_budget, 0 to 1, for batches that do not fit otherwise"
    )
    parser.add_argument("--limit", type=float, default=480, help="on a GPU: seconds until everything is compiled")
    parser.add_argument("--apart", action="store_true", help="as on a GPU, on any device")
    parser.add_argument("--side", choices=("eager", "torch.compile"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.side:
        startup.keep_memory()  # as motif_jax.main; PyTorch keeps its memory by itself
        print(machine())
        print("| configuration | clips | ours, s | PyTorch, s | PyTorch / ours | PyTorch's way |\n|---|---|---|---|---|---|", flush=True)
    for name in arguments.config or ["configs/motif.py:tiny", "configs/motif.py:small"]:
        config = load_config(name)
        given = {"batch_size": arguments.batch, "remat": arguments.remat}
        config = dataclasses.replace(config, **{key: value for key, value in given.items() if value})
        if arguments.side:
            torch_side(config, arguments)
        elif arguments.apart or jax.default_backend() != "cpu":
            apart(name, config, arguments)
        else:
            by_turns(name, config, arguments)


if __name__ == "__main__":
    run(main)
