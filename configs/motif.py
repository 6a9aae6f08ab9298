"""MotiF at the paper's size: VideoCrafter2 U-Net, 16 frames of 320x512, global batch 64, 32,000 steps.

    python -m motif_jax.prepare --config=configs/motif.py --source=captions.csv --output=DATA \
        --config.prepare.flow_weights=raft-small.pth
    python -m motif_jax.main    --config=configs/motif.py --workdir=RUN --config.data.path=DATA --config.init_from=WEIGHTS

The argument shrinks everything together, so that sizes cannot drift apart:

    configs/motif.py          the paper
    configs/motif.py:small    64 channels, 8 frames of 128x128, pixel latents, word vectors: no weights needed
    configs/motif.py:tiny     32 channels, 16 frames of 64x64, the same: seconds per step on two cores
"""

from ml_collections import ConfigDict

from motif_jax.config import Config, to_dict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict(to_dict(Config()))  # the defaults of motif_jax.config
    config.name = "motif"

    # Training settings of the paper: v-prediction, lambda = 1, text dropped 10 % of the time, lr 5e-5, global batch 64, 32,000 steps.
    config.diffusion.prediction = "v"
    config.loss.motion_weight = 1.0
    config.loss.heatmap = "flow"
    config.condition.text_drop = 0.1
    config.learning_rate = 5e-5
    config.batch_size = 64
    config.steps = 32_000
    config.data.update(frames=16, height=320, width=512)

    # Not said in the paper: see the README's table of settings.
    config.condition.image = "repeat"
    config.diffusion.zero_terminal_snr = True
    config.diffusion.base_scale = 0.7
    config.prepare.update(frame_stride_min=1, frame_stride_max=6, flow="raft_small", flow_iterations=12)
    config.loss.intensity = "diagonal"
    config.remat = "convs"

    # Parameters, optimizer and average are sharded over all devices: docs/scaling.md says why. Copies do not fit a v5e or v6e chip.
    if size == "paper":
        config.mesh.update(data=1, fsdp=-1)

    if size in ("small", "tiny"):
        config.name = f"motif_{size}"
        config.dtype = "float32"
        config.remat = "none"
        config.batch_size = 2
        config.autoencoder.update(kind="pixel", factor=8, z_channels=192, scale_factor=1.0)
        config.text.update(kind="words", vocab_size=4096, context_length=32, width=64)
        config.unet.update(in_channels=384, out_channels=192, context_dim=64)
        config.eval.update(every=100, batches=1, buckets=3)
        config.sample.update(every=200, count=2, steps=10)
        config.checkpoint.every = 100
        config.log_every = 1
    if size == "small":
        config.unet.update(model_channels=64, num_res_blocks=2, num_head_channels=16)
        config.data.update(frames=8, height=128, width=128)
    elif size == "tiny":
        config.unet.update(model_channels=32, num_res_blocks=1, num_head_channels=8)
        config.data.update(frames=16, height=64, width=64)
    elif size != "paper":
        raise ValueError(f"configs/motif.py:{size}: unknown size; use paper, small or tiny")
    return config.lock()
