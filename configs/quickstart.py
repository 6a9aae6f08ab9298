"""A laptop in minutes: coloured shapes that move as a sentence says, on two CPU cores; `launch/quickstart.sh` runs it all.

    python -m motif_jax.prepare --config=configs/quickstart.py --source=synthetic:quickstart:8000 --output=runs/quickstart/data
    python -m motif_jax.main    --config=configs/quickstart.py --workdir=runs/quickstart --config.data.path=runs/quickstart/data
    python -m motif_jax.bench synthetic --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from motif_jax.config import Config, to_dict


def get_config() -> ConfigDict:
    config = ConfigDict(to_dict(Config()))
    config.name = "quickstart"
    config.dtype = "float32"
    config.steps = 3000
    config.batch_size = 16
    config.learning_rate = 1.5e-3
    config.optimizer.update(warmup_steps=100, grad_clip=1.0)
    config.ema.decay = 0.995
    config.log_every = 50

    # 8 frames of 32x32; latents are 4x4 blocks of pixels; one token covers a block over the whole clip.
    config.data.update(frames=8, height=32, width=32)
    config.prepare.update(flow="exact", flow_stride=4, image_format="png", clips_per_shard=1000)
    config.autoencoder.update(kind="pixel", factor=4, z_channels=48, scale_factor=1.0)
    config.text.update(kind="words", vocab_size=4096, context_length=8, width=64)
    config.backbone = "dit"
    config.dit.update(width=128, depth=4, num_head_channels=32, patch=(8, 1, 1))

    # The network puts out clean latents, the loss is on v. A shape's speed is the fastest thing in its clip.
    config.diffusion.update(prediction="x0", loss_space="v")
    config.loss.update(heatmap="flow", intensity="clip_max", motion_weight=1.0)

    config.checkpoint.every = 500
    config.eval.update(every=500, batches=2, buckets=5)
    config.sample.update(every=1500, count=4, steps=20, guidance=2.0)
    return config.lock()
