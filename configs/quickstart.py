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
    config.steps = 1200
    config.batch_size = 16
    config.learning_rate = 1.5e-3
    config.optimizer.update(warmup_steps=100, grad_clip=1.0, schedule="cosine")
    config.ema.decay = 0.995
    config.log_every = 20

    # 8 frames of 32x32; latents are blocks of 8x8 pixels with their colours as channels.
    config.data.update(frames=8, height=32, width=32)
    config.prepare.update(flow="exact", flow_stride=8, image_format="png", clips_per_shard=1000)
    config.autoencoder.update(kind="pixel", factor=8, z_channels=192, scale_factor=1.0)
    config.text.update(kind="words", vocab_size=4096, context_length=8, width=64)

    # The paper's U-Net with one level; time passes through the temporal convolutions alone, and every clip has 8 frames a second.
    config.unet.update(in_channels=384, out_channels=192, context_dim=64)
    config.unet.update(model_channels=64, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=16)
    config.unet.update(norm_groups=8, temporal_attention=False, addition_attention=False, fps_cond=False, temporal_dropout=0.0)

    # The network puts out clean latents, and so does the loss compare: a 64-channel network cannot pass on the noise of 192.
    config.diffusion.prediction = "x0"
    # A shape's speed is the fastest thing in its clip, 1.6 pixels a frame: far below 5 % of the diagonal.
    config.loss.update(heatmap="flow", intensity="clip_max", motion_weight=1.0)

    config.checkpoint.every = 300
    config.eval.update(every=300, batches=4, buckets=5)
    config.sample.update(every=600, count=4, steps=12, guidance=2.0)
    return config.lock()
