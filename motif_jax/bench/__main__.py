"""Benchmarks of trained models: python -m motif_jax.bench COMMAND ...

synthetic --workdir=RUN [--world=NAME --count=N]
    How often do samples of the synthetic world do what their sentence says? Held-out combinations of shape, colour and
    direction; rates with intervals, the static clip and the truth beside them. Writes RUN/synthetic.json and the report.
"""

import pathlib

from absl import flags

from motif_jax import commands
from motif_jax.config import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a run")
WORLD = flags.DEFINE_string("world", "quickstart", "synthetic: name of the world")
COUNT = flags.DEFINE_integer("count", 128, "synthetic: clips per split", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "synthetic: seed of the world")
COMMANDS = ("synthetic",)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] not in COMMANDS:
        raise UserError(f"give one command: {', '.join(COMMANDS)}; --help explains them")
    if WORKDIR.value is None:
        raise UserError("--workdir is missing")
    run_synthetic(pathlib.Path(WORKDIR.value), WORLD.value, SEED.value, COUNT.value)


def run_synthetic(workdir: pathlib.Path, world: str, seed: int, count: int) -> None:
    from motif_jax import animation, report
    from motif_jax.bench import synthetic
    from motif_jax.data import sprites
    from motif_jax.training.samples import save_comparison

    if world not in sprites.WORLDS:
        raise UserError(f"--world={world}: no such world; known: {', '.join(sprites.WORLDS)}")
    animator = animation.Animator.load(workdir)
    d = animator.config.data
    result = synthetic.evaluate(
        lambda images, prompts, seeds: animator(list(images), prompts, list(seeds)),
        world,
        seed,
        count,
        d.frames,
        d.height,
        d.width,
        progress=lambda text: print(text, flush=True),
    )
    (workdir / "synthetic.json").write_text(synthetic.to_json(result))
    show = sprites.make_clips(world, seed, range(8), d.frames, d.height, d.width, "heldout")
    made = animator(list(show["frames"][:, 0]), show["captions"], list(range(8)))
    save_comparison(workdir / "synthetic", show["frames"], made, show["captions"], animator.config.sample.fps)
    report.write(workdir)
    print(synthetic.table(result))


if __name__ == "__main__":
    commands.run("motif_jax.bench", main)
