"""The train state and the train step on a mesh: where each of their arrays lies."""

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from motif_jax.config import Config
from motif_jax.dist.mesh import shard_like_params
from motif_jax.models.networks import Networks, Params
from motif_jax.training import finetune, state
from motif_jax.training.step import Loss, make_train_step, motion_focal_loss


def make_state(config: Config, networks: Networks, mesh: Mesh, optimizer: optax.GradientTransformation):
    """(the state's shapes with their shardings, a jitted function from placed parameters to the state of step 0)."""
    shapes = finetune.shapes(config, networks)

    def create(params: Params) -> state.TrainState:
        return state.create(params, optimizer, config.ema.decay > 0, finetune.trained(config, params))

    abstract = jax.eval_shape(create, shapes)
    shardings = shard_like_params(abstract, set(shapes), mesh)
    template = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings)
    return template, jax.jit(create, out_shardings=shardings, donate_argnums=0)


def jit_train_step(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    template: state.TrainState,
    loss: Loss = motion_focal_loss,
    learning_rate: optax.Schedule | None = None,
):
    """The train step as a run calls it: the state is donated and stays where `make_state`'s template says."""
    shardings = jax.tree.map(lambda s: s.sharding, template), NamedSharding(mesh, PartitionSpec())
    return jax.jit(make_train_step(networks, optimizer, mesh, loss, learning_rate), donate_argnums=0, out_shardings=shardings)
