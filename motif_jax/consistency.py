"""What the fields of a `Config` demand of each other, and what they quietly do together; each alone is checked where it is read."""

import math
import typing

if typing.TYPE_CHECKING:
    from motif_jax.config import Config


UNGUIDED = "{}=0: samples do not see their sentence at all; 1 turns guidance off"
LEAST_SIGNAL = 1e-37  # smallest alpha_bar of the schedule before it is rescaled: float32 has no less


def contradictions(c: "Config") -> list[str]:
    """Mistakes that only show when fields are read together."""
    bad = []

    def check(ok: bool, text: str) -> None:
        if not ok:
            bad.append(text)

    check(
        "://" not in c.init_from or c.init_from.startswith(("gs://", "gcs://", "file://")),
        f"init_from={c.init_from}: weights are read from file systems and gs:// alone; copy or mount the directory first",
    )
    factor, z = c.autoencoder.factor, c.autoencoder.z_channels
    if c.autoencoder.kind == "pixel":
        check(z == 3 * factor**2, f"autoencoder.z_channels={z}: a pixel autoencoder of factor {factor} has {3 * factor**2}")
    else:
        levels = 2 ** (len(c.autoencoder.ch_mult) - 1)
        check(factor == levels, f"autoencoder.factor={factor}: ch_mult {c.autoencoder.ch_mult} gives {levels}")
        for width in sorted({c.autoencoder.ch * m for m in (1, *c.autoencoder.ch_mult)}):  # every norm has 32 groups
            check(width > 0 and width % 32 == 0, f"autoencoder.ch, ch_mult: the level width {width} must be a multiple of 32")
    if c.text.kind == "openclip":
        check(c.text.width % c.text.heads == 0, f"text.heads={c.text.heads}: must divide text.width={c.text.width}")
    u, dit = c.unet, c.dit
    unet = c.backbone == "unet3d"
    if unet:
        check(u.out_channels == z, f"unet.out_channels={u.out_channels}: must equal autoencoder.z_channels={z}")
        parts = f"noisy latent {z}" + f", image latent {z}" * (c.condition.image != "none") + ", mask 1" * (c.condition.image == "first")
        check(u.in_channels == c.in_channels, f"unet.in_channels={u.in_channels}: must be {c.in_channels} ({parts})")
        check(u.context_dim == c.text.width, f"unet.context_dim={u.context_dim}: must equal text.width={c.text.width}")
        check(min(u.channel_mult, default=0) > 0, f"unet.channel_mult={u.channel_mult}: must name at least one level, each of 1 or more")
        check(
            u.model_channels % u.norm_groups == 0, f"unet.norm_groups={u.norm_groups}: must divide unet.model_channels={u.model_channels}"
        )
        rates = all(rate > 0 and rate.bit_count() == 1 for rate in u.attention_resolutions)
        check(rates, f"unet.attention_resolutions={u.attention_resolutions}: must be of 1, 2, 4, ...; every level halves height and width")
        for width in sorted({u.model_channels * m for m in u.channel_mult}):
            check(width % u.num_head_channels == 0, f"unet.num_head_channels={u.num_head_channels}: must divide the level width {width}")
    else:
        check(len(dit.patch) == 3 and min(dit.patch) > 0, f"dit.patch={dit.patch}: must be (frames, rows, columns)")
        check(dit.width % dit.num_head_channels == 0, f"dit.num_head_channels={dit.num_head_channels}: must divide dit.width={dit.width}")
    if c.image_tokens:
        i, frames = c.image, c.resampler.frames
        check(i.size % i.patch == 0, f"image.patch={i.patch}: must divide image.size={i.size}")
        check(i.width % i.heads == 0, f"image.heads={i.heads}: must divide image.width={i.width}")
        check(frames in (1, c.data.frames), f"resampler.frames={frames}: must be data.frames={c.data.frames}, or 1 for shared tokens")
    check(
        c.condition.image != "none" or c.image_tokens,
        "condition.image='none': the image would not enter the network; set unet.image_cross_attention=True (backbone 'unet3d')",
    )
    check(
        c.condition.image != "none" or c.condition.image_noise == 0,
        f"condition.image_noise={c.condition.image_noise}: condition.image='none' has no image latent to add it to; set 0",
    )
    if bad:
        return bad  # what follows divides by these
    if not unet:
        check(c.data.frames % dit.patch[0] == 0, f"data.frames={c.data.frames}: must be a multiple of dit.patch's {dit.patch[0]}")
    for axis, side in enumerate(("height", "width")):
        n = getattr(c.data, side)
        unit = factor * (2 ** (len(u.channel_mult) - 1) if unet else dit.patch[1 + axis])
        whose = "the downsampling of unet.channel_mult" if unet else "dit.patch"
        check(n % unit == 0, f"data.{side}={n}: must be a multiple of {unit} (autoencoder.factor times {whose})")
        check(n % c.prepare.flow_stride == 0, f"data.{side}={n}: must be a multiple of prepare.flow_stride={c.prepare.flow_stride}")
    check(
        c.prepare.frame_stride_min <= c.prepare.frame_stride_max,
        f"prepare.frame_stride_min={c.prepare.frame_stride_min}: must not exceed prepare.frame_stride_max={c.prepare.frame_stride_max}",
    )
    check(
        not c.prepare.flow.startswith("raft") or c.prepare.flow_stride % 8 == 0,
        f"prepare.flow_stride={c.prepare.flow_stride}: RAFT's grid is 8 pixels; use a multiple of it",
    )
    check(
        c.prepare.motion_max == 0.0 or c.prepare.motion_min < c.prepare.motion_max,
        f"prepare.motion_max={c.prepare.motion_max}: must exceed prepare.motion_min={c.prepare.motion_min}, or be 0 (off)",
    )
    check(
        c.batch_size % c.grad_accumulation == 0,
        f"grad_accumulation={c.grad_accumulation}: must divide batch_size={c.batch_size}",
    )
    check(c.ema.decay < 1.0 or c.ema.warmup, "ema.decay=1.0: the average would never move; use less than 1, or ema.warmup=True")
    check(
        c.diffusion.beta_start <= c.diffusion.beta_end,
        f"diffusion.beta_start={c.diffusion.beta_start}: must not exceed diffusion.beta_end={c.diffusion.beta_end}",
    )
    # The logarithm of the last alpha_bar, of betas as in `diffusion.schedule.make_schedule` (a configuration is checked without NumPy).
    timesteps, first, last = c.diffusion.num_timesteps, math.sqrt(c.diffusion.beta_start), math.sqrt(c.diffusion.beta_end)
    decay = sum(math.log1p(-((first + (last - first) * t / (timesteps - 1)) ** 2)) for t in range(timesteps))
    check(
        decay > math.log(LEAST_SIGNAL) or c.diffusion.prediction.startswith("flow"),
        f"diffusion.beta_end={c.diffusion.beta_end}: after num_timesteps={timesteps}, alpha_bar is less than {LEAST_SIGNAL:g}; "
        "use smaller betas",
    )
    check(c.eval.buckets <= timesteps, f"eval.buckets={c.eval.buckets}: at most diffusion.num_timesteps={timesteps}")
    check(
        not (c.diffusion.zero_terminal_snr and c.diffusion.prediction == "eps"),
        "diffusion.zero_terminal_snr=True: impossible with prediction='eps' (x_0 is undefined at the last step); "
        "use 'v' or 'x0', or turn it off",
    )
    check(
        c.diffusion.base_scale == 1.0 or not c.diffusion.prediction.startswith("flow"),
        f"diffusion.base_scale={c.diffusion.base_scale}: flow matching has no dynamic rescale; set 1.0",
    )
    same_family = ("flow", "flow_x0") if c.diffusion.prediction.startswith("flow") else ("v", "eps", "x0")
    check(
        c.diffusion.loss_space in ("", *same_family),
        f"diffusion.loss_space={c.diffusion.loss_space!r}: with prediction={c.diffusion.prediction!r} one of {same_family}",
    )
    axes = {f"mesh.{name}": getattr(c.mesh, name) for name in ("data", "fsdp", "context", "tensor")}
    taking = ", ".join(f"{name}=-1" for name, size in axes.items() if size == -1)
    check(taking.count("-1") <= 1, f"{taking}: only one axis can take the devices that are left; give the others a size")
    for name, size in axes.items():
        check(size != 0, f"{name}=0: must be 1 or more, or -1 for the devices that are left")
    check(
        c.profile.start == 0 or c.profile.start < c.steps,
        f"profile.start={c.profile.start}: no step comes after it, steps={c.steps}; use a smaller one, or 0 (off)",
    )
    check(
        c.sample.steps <= timesteps,
        f"sample.steps={c.sample.steps}: at most diffusion.num_timesteps={timesteps}",
    )
    check(
        c.sample.eta == 0.0 or not c.diffusion.prediction.startswith("flow"),
        f"sample.eta={c.sample.eta}: flow matching's steps add no noise; set 0.0",
    )
    check(
        unet or not u.image_cross_attention,
        "unet.image_cross_attention=True: backbone='dit' has none; use backbone='unet3d', or False",
    )
    return bad


def surprises(c: "Config") -> list[str]:
    """What is allowed and may be meant, but does less than its name says in a run of `c.steps`; a line each, for the start of training."""
    found = []

    def say(surprising: bool, text: str) -> None:
        if surprising:
            found.append(text)

    warmup, guidance, drop, decay = c.optimizer.warmup_steps, c.sample.guidance, c.condition.text_drop, c.ema.decay
    say(
        warmup > c.steps > 0,
        f"optimizer.warmup_steps={warmup}: the learning rate still rises at the end, steps={c.steps}; it never reaches {c.learning_rate:g}",
    )
    say(
        warmup == c.steps > 0 and c.optimizer.schedule == "cosine",
        f"optimizer.schedule='cosine': never decays, because the warm-up takes all {c.steps} steps",
    )
    kept = 0.0 if c.ema.warmup else decay**c.steps
    say(
        c.steps > 0 and kept > 0.1,
        f"ema.decay={decay} without ema.warmup: the average, which is evaluated and sampled, will be {100 * kept:.0f} % the first weights",
    )
    say(
        drop == 0 and guidance != 1 and not c.init_from,
        f"condition.text_drop=0.0: the empty sentence is never trained, and sample.guidance={guidance:g} needs it; 1 does not",
    )
    say(drop == 1, "condition.text_drop=1.0: no sentence is ever seen, so the model does not learn to follow one")
    say(guidance == 0, UNGUIDED.format("sample.guidance"))
    every, keep_every = c.checkpoint.every, c.checkpoint.keep_every
    say(
        keep_every > 0 and keep_every % every != 0 and every % keep_every != 0,
        f"checkpoint.keep_every={keep_every}: of the checkpoints at multiples of checkpoint.every={every} it keeps only those of "
        f"{math.lcm(every, max(keep_every, 1))}; use a multiple",
    )
    say(c.backbone == "dit" and c.unet.dropout > 0, f"unet.dropout={c.unet.dropout}: backbone='dit' has none")
    return found
