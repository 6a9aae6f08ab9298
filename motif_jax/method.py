"""What a run computes besides what its configuration says: the functions that research replaces (docs/extend.md)."""

import dataclasses
from collections.abc import Callable

import optax

from motif_jax.config import Config
from motif_jax.generation import Sampler, sample_latents
from motif_jax.models.networks import MakeDenoiser, make_denoiser
from motif_jax.training.optimizer import make_optimizer, make_schedule
from motif_jax.training.step import Loss, motion_focal_loss


@dataclasses.dataclass(frozen=True)
class Method:
    """Functions whose first argument is the `Config`; the defaults (`DEFAULT`) are what the entry points run.

    A work directory keeps the configuration, and of these only the names: give the same ones to continue a run (`training.loop.train`) and
    to sample it (`Animator.load`).
    """

    denoiser: MakeDenoiser = make_denoiser
    loss: Loss = motion_focal_loss
    learning_rate: Callable[[Config], optax.Schedule] = make_schedule
    optimizer: Callable[[Config, optax.Schedule], optax.GradientTransformation] = make_optimizer
    sampler: Sampler = sample_latents

    @property
    def names(self) -> dict[str, str]:
        """By dotted name, what a continued run shares with its beginning: what the functions are called that training depends on."""

        def name(function: Callable, own: Callable) -> str:
            return "the library's" if function is own else getattr(function, "__qualname__", type(function).__qualname__)

        fields = "denoiser", "loss", "learning_rate", "optimizer"
        return {f"method.{field}": name(getattr(self, field), getattr(Method, field)) for field in fields}


DEFAULT = Method()
