"""Run by test_sharded.py in a process with eight devices: the real train step on several meshes, its numbers as one JSON line."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from motif_jax.config import CheckpointConfig, MeshConfig, from_json
from motif_jax.dist.mesh import BATCH, global_batch, make_mesh, place, shard_networks
from motif_jax.generation import make_generator
from motif_jax.models.networks import Networks
from motif_jax.training import finetune
from motif_jax.training.checkpoint import Checkpoints
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.sharded import jit_train_step, make_state
from motif_jax.training.step import make_eval_step

MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4))
SPLIT = (2, 2, 2, 1)


class Run:
    """A configuration on a mesh: `state`, `step()`, `evaluate()`, `sample()`, and the shapes to restore into."""

    def __init__(self, config, sizes, **changes):
        self.config = dataclasses.replace(config, **changes)
        self.mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        networks, optimizer = Networks.of(self.config), make_optimizer(self.config)
        self.template, create = make_state(self.config, networks, self.mesh, optimizer)
        self.shardings = jax.tree.map(lambda s: s.sharding, self.template)
        rng = np.random.default_rng(0)  # no weight is zero: freshly made networks put out zeros, through which no gradient passes

        def random(shapes):
            return {k: np.float32(rng.normal(0, 0.1, s.shape) + k.endswith("scale")) for k, s in sorted(shapes.items())}

        self.state = create(place(random(finetune.shapes(self.config, networks)), self.shardings.params))
        frozen = {name: random(network.shapes) for name, network in networks.frozen.items()}
        replicated = NamedSharding(self.mesh, PartitionSpec())
        placed = place(frozen, shard_networks(frozen, self.mesh))
        self.frozen = networks.with_unconditional(placed, lambda _: np.zeros((1, self.config.text.context_length)), replicated)
        self.train_step = jit_train_step(networks, optimizer, self.mesh, self.template)
        self.eval_step = jax.jit(make_eval_step(networks, self.mesh), out_shardings=replicated)
        self.generate = make_generator(networks, self.mesh)

    def batch(self, seed):
        rng, d, n = np.random.default_rng(seed), self.config.data, self.config.batch_size
        flow = np.zeros((n, d.frames, d.height // 4, d.width // 4, 2), np.float16)
        flow[:, :, 1, 2] = 2.0
        batch = {
            "frames": rng.integers(0, 256, (n, d.frames, d.height, d.width, 3), dtype=np.uint8),
            "tokens": rng.integers(1, 500, (n, 8)).astype(np.int32),
            "flow": flow,
            "fps": np.full(n, 8.0, np.float32),
        }
        return global_batch(batch, self.mesh, n)

    def step(self, seed):
        self.state, metrics = self.train_step(self.state, self.frozen, self.batch(seed))
        return {k: float(v) for k, v in metrics.items()}

    def evaluate(self):
        t_B = np.linspace(0, 999, self.config.batch_size).astype(np.int32)
        return np.asarray(self.eval_step(self.state.best, self.frozen, self.batch(0), t_B, jax.random.key(1)).overall)

    def sample(self):
        batch, seeds = self.batch(0), place(np.arange(self.config.batch_size, dtype=np.int32), NamedSharding(self.mesh, BATCH))
        clips, _ = self.generate(self.state.best, self.frozen, batch["frames"][:, 0], batch["tokens"], batch["fps"], seeds)
        return np.asarray(clips).astype(int)

    def gradient(self):
        """The gradient of the first step: AdamW's first moment is then (1 - b1) times it."""
        moment = next(s.mu for s in jax.tree.leaves(self.state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
        return {k: np.asarray(v, np.float64) for k, v in moment.items()}


def distance(found, expected):
    """(norm of the difference over the norm, the largest such number of any one parameter)."""
    each = {k: np.linalg.norm(found[k] - v) / np.linalg.norm(v) for k, v in expected.items()}
    whole = np.sqrt(sum(np.sum((found[k] - v) ** 2) for k, v in expected.items()) / sum(np.sum(v**2) for v in expected.values()))
    return float(whole), float(max(each.values()))


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)) for x, y in leaves)


def local_share(params):
    kernels = [v for k, v in params.items() if k.endswith("kernel")]
    return sum(v.addressable_shards[0].data.size for v in kernels) / sum(v.size for v in kernels)


def with_towers(config):
    """One device and a mesh, for a configuration whose frozen networks have parameters: evaluation, sampling and steps between them."""
    one, split = Run(config, (1, 1, 1, 1)), Run(config, SPLIT)
    losses, clips = one.evaluate(), one.sample()
    result = {
        "evaluation": float(np.max(np.abs(split.evaluate() / losses - 1))),
        "clips": float(np.mean(np.abs(split.sample() - clips))),
        "contrast": float(np.mean(np.abs(clips - np.roll(clips, 1, axis=0)))),
        "loss": abs(split.step(0)["loss"] / one.step(0)["loss"] - 1),
        "local": {name: local_share(params) for name, params in split.frozen.items() if name != "unconditional"},
    }
    split.evaluate(), split.sample(), split.step(1)
    return result | {"compilations": [f._cache_size() for f in (split.train_step, split.eval_step, split.generate)]}


def main(config, towers, directory):
    result = {"towers": with_towers(towers)}
    single = Run(config, (1, 1, 1, 1))
    loss = single.step(0)["loss"]
    expected = single.gradient()
    runs = {}
    for sizes in MESHES:
        run = Run(config, sizes)
        found = run.step(0)["loss"]
        whole, worst = distance(run.gradient(), expected)
        for seed in (1, 2):
            run.step(seed)
        result[str(sizes)] = {
            "loss": abs(found - loss) / loss,
            "gradient": whole,
            "worst": worst,
            "compilations": run.train_step._cache_size(),
            "local": local_share(run.state.params),
        }
        runs[sizes] = run

    # Saved on eight devices after three steps; the fourth step is then taken by this run, by itself restored, and by fewer devices.
    run = runs[SPLIT]
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(3, run.state, {"step": 3}, {})
    checkpoints.wait()
    saved = jax.tree.map(np.asarray, run.state)
    straight = run.step(3)
    after = jax.tree.map(np.asarray, run.state)
    run.state = checkpoints.restore(3, run.template)[0]
    again = run.step(3)
    result["resumed"] = {"metrics": again == straight, "state": same(run.state, after)}
    half = Run(config, (2, 2, 1, 1))
    half.state = checkpoints.restore(3, half.template)[0]
    result["four"] = {"state": same(half.state, saved)}
    checkpoints.save(4, half.state, {"step": 3}, {})  # and from four devices to one
    checkpoints.wait()
    single.state = checkpoints.restore(4, single.template)[0]
    result["one"] = {"state": same(single.state, saved), "loss": abs(single.step(3)["loss"] - straight["loss"]) / straight["loss"]}
    checkpoints.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main(from_json(sys.argv[1]), from_json(sys.argv[2]), pathlib.Path(sys.argv[3]))
