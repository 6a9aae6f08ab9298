"""RAFT optical flow (Teed and Deng, ECCV 2020), small and large, for inference.

In: two RGB frames with values 0..255. Out: flow (u to the right, v down) in pixels from the first frame to the second.
The attribute tree equals the state dict of the authors' code, so `motif_jax.interop.raft` addresses weights by one path.
Dimension letters: B pairs, N grid cells h*w, K window side, the grid is 1/8 of the padded frame.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from motif_jax.models.placement import platform
from motif_jax.motion.tensor_cores import convolve, prepare, prepared

CELL = 8  # pixels per grid cell
LEVELS = 4  # levels of the correlation pyramid
MIN_SIDE = CELL * 2 ** (LEVELS - 1)  # the coarsest level keeps one cell


@dataclass(frozen=True)
class Variant:
    """The widths in which RAFT small and large differ (paper appendix A; the authors' code fixes what the paper leaves open)."""

    stem: int
    stages: tuple[int, int, int]
    bottleneck: bool
    fnet_width: int
    context_norm: bool
    hidden: int
    context: int
    radius: int
    correlation: tuple[int, ...]  # motion encoder: widths on the correlation window
    flow: tuple[int, int]  # and on the flow
    motion: int  # and of both together; the flow itself is appended
    kernels: dict[str, tuple[int, int]]  # GRU steps: name suffix -> kernel
    flow_head: int
    mask_head: int  # 0: bilinear upsampling


VARIANTS = {
    "small": Variant(
        stem=32, stages=(32, 64, 96), bottleneck=True, fnet_width=128, context_norm=False, hidden=96, context=64, radius=3,
        correlation=(96,), flow=(64, 32), motion=80, kernels={"": (3, 3)}, flow_head=128, mask_head=0,
    ),
    "large": Variant(
        stem=64, stages=(64, 96, 128), bottleneck=False, fnet_width=256, context_norm=True, hidden=128, context=128, radius=4,
        correlation=(256, 192), flow=(128, 64), motion=126, kernels={"1": (1, 5), "2": (5, 1)}, flow_head=256, mask_head=256,
    ),
}  # fmt: skip


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, **shared: Any) -> nnx.Conv:
    # Explicit symmetric padding: 'SAME' would pad a stride-2 convolution on one side only.
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = [(k // 2, k // 2) for k in kernel]
    return nnx.Conv(inputs, outputs, kernel, strides=stride, padding=padding, conv_general_dilated=convolve, **shared)


class BatchNorm(nnx.BatchNorm):
    """Running statistics only; keeps PyTorch's batch counter so that weights leave as they came."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, use_running_average=True, epsilon=1e-5, rngs=rngs)
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))


class InstanceNorm(nnx.Module):
    """Zero mean and unit variance per sample and channel, no parameters."""

    def __call__(self, x_BHWC: Array) -> Array:
        x_BHWC = x_BHWC.astype(jnp.float32)
        x_BHWC = x_BHWC - x_BHWC.mean((1, 2), keepdims=True)
        return x_BHWC * jax.lax.rsqrt(jnp.square(x_BHWC).mean((1, 2), keepdims=True) + 1e-5)


def _norm(kind: str, width: int, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "batch":
        return BatchNorm(width, rngs)
    return InstanceNorm() if kind == "instance" else nnx.identity


class Block(nnx.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 on a quarter of the width. The stride sits on the first 3x3."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, bottleneck: bool, rngs: nnx.Rngs, **shared: Any):
        shared["rngs"] = rngs
        inner = outputs // 4
        if bottleneck:
            shapes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        else:
            shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        self.depth = len(shapes)
        for i, shape in enumerate(shapes, 1):
            setattr(self, f"conv{i}", _conv(*shape, **shared))
            setattr(self, f"norm{i}", _norm(norm, shape[1], rngs))
        if stride > 1:
            self.downsample = nnx.List([_conv(inputs, outputs, 1, stride, **shared), _norm(norm, outputs, rngs)])
        else:
            self.downsample = nnx.List([])

    def __call__(self, x_BHWC: Array) -> Array:
        y_BHWC = x_BHWC
        for i in range(1, self.depth + 1):
            y_BHWC = nnx.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y_BHWC)))
        for layer in self.downsample:
            x_BHWC = layer(x_BHWC)
        return nnx.relu(x_BHWC + y_BHWC)


class Encoder(nnx.Module):
    """Frames in [-1, 1] to features on the 1/8 grid."""

    def __init__(self, v: Variant, outputs: int, norm: str, rngs: nnx.Rngs, **shared: Any):
        self.conv1 = _conv(3, v.stem, 7, 2, rngs=rngs, **shared)
        self.norm1 = _norm(norm, v.stem, rngs)
        width = v.stem
        for i, (outer, stride) in enumerate(zip(v.stages, (1, 2, 2), strict=True), 1):
            first = Block(width, outer, stride, norm, v.bottleneck, rngs, **shared)
            setattr(self, f"layer{i}", nnx.List([first, Block(outer, outer, 1, norm, v.bottleneck, rngs, **shared)]))
            width = outer
        self.conv2 = _conv(width, outputs, 1, rngs=rngs, **shared)

    def __call__(self, x_BHWC: Array) -> Array:
        x_BHWC = nnx.relu(self.norm1(self.conv1(x_BHWC)))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x_BHWC = block(x_BHWC)
        return self.conv2(x_BHWC)


class MotionEncoder(nnx.Module):
    """Correlation window and current flow to motion features; the last two channels are the flow itself."""

    def __init__(self, v: Variant, **shared: Any):
        self.convc1 = _conv(LEVELS * (2 * v.radius + 1) ** 2, v.correlation[0], 1, **shared)
        self.convc2 = _conv(*v.correlation, 3, **shared) if len(v.correlation) == 2 else None
        self.convf1 = _conv(2, v.flow[0], 7, **shared)
        self.convf2 = _conv(*v.flow, 3, **shared)
        self.conv = _conv(v.correlation[-1] + v.flow[1], v.motion, 3, **shared)

    def __call__(self, flow_Bhw2: Array, window_BhwC: Array) -> Array:
        c_BhwC = nnx.relu(self.convc1(window_BhwC))
        if self.convc2 is not None:
            c_BhwC = nnx.relu(self.convc2(c_BhwC))
        f_BhwC = nnx.relu(self.convf2(nnx.relu(self.convf1(flow_Bhw2))))
        motion_BhwC = nnx.relu(self.conv(jnp.concatenate([c_BhwC, f_BhwC], -1)))
        return jnp.concatenate([motion_BhwC, flow_Bhw2], -1)


class ConvGRU(nnx.Module):
    """One 3x3 GRU (small), or a 1x5 and a 5x1 GRU in turn (large), on the channels [hidden, context, motion].

    The context never changes during refinement, so that its share of each convolution is computed once (`constant`) and
    added in every iteration; `weights` are those of the rest.
    """

    def __init__(self, v: Variant, **shared: Any):
        self.hidden, self.context, self.kernels = v.hidden, v.context, v.kernels
        self.precision, self.dtype = shared["precision"], shared["dtype"]
        for suffix, kernel in v.kernels.items():
            for gate in "zrq":
                setattr(self, f"conv{gate}{suffix}", _conv(v.hidden + v.context + v.motion + 2, v.hidden, kernel, **shared))

    def _parameters(self, suffix: str, name: str) -> list[Array]:
        return [getattr(getattr(self, f"conv{gate}{suffix}"), name)[...] for gate in "zrq"]

    def _convolve(self, x_BhwC: Array, kernel: Array, suffix: str) -> Array:
        padding = [(k // 2, k // 2) for k in self.kernels[suffix]]
        x_BhwC, kernel = x_BhwC.astype(self.dtype), kernel.astype(self.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        return convolve(x_BhwC, kernel, (1, 1), padding, dimension_numbers=layout, precision=self.precision).astype(jnp.float32)

    def constant(self, context_BhwC: Array) -> dict[str, tuple[Array, Array]]:
        """The context's share of (z and r on the channels, q), bias included, per GRU step."""
        inputs = slice(self.hidden, self.hidden + self.context)
        terms = {}
        for suffix in self.kernels:
            kernel = jnp.concatenate([k[:, :, inputs] for k in self._parameters(suffix, "kernel")], -1)
            bias = jnp.concatenate(self._parameters(suffix, "bias"))
            both = self._convolve(context_BhwC, kernel, suffix) + bias
            terms[suffix] = both[..., : 2 * self.hidden], both[..., 2 * self.hidden :]
        return terms

    def weights(self) -> dict[str, tuple[Array, Array]]:
        """The kernels of (z and r, q) on hidden state and motion, prepared, per GRU step."""
        found = {}
        for suffix in self.kernels:
            kernels = self._parameters(suffix, "kernel")
            z, r, q = (jnp.concatenate([k[:, :, : self.hidden], k[:, :, self.hidden + self.context :]], 2) for k in kernels)
            found[suffix] = tuple(prepare(k.astype(self.dtype), self.precision) for k in (jnp.concatenate([z, r], -1), q))
        return found

    def __call__(self, h_BhwC: Array, motion_BhwC: Array, weights: dict[str, tuple], constant: dict[str, tuple]) -> Array:
        for suffix in self.kernels:
            (z_r, q), (z_r_context, q_context) = weights[suffix], constant[suffix]
            gates = self._convolve(jnp.concatenate([h_BhwC, motion_BhwC], -1), z_r, suffix) + z_r_context
            z, r = jnp.split(nnx.sigmoid(gates), 2, -1)
            q = self._convolve(jnp.concatenate([r * h_BhwC, motion_BhwC], -1), q, suffix) + q_context
            h_BhwC = (1 - z) * h_BhwC + z * jnp.tanh(q)
        return h_BhwC


class FlowHead(nnx.Module):
    def __init__(self, inputs: int, inner: int, **shared: Any):
        self.conv1 = _conv(inputs, inner, 3, **shared)
        self.conv2 = _conv(inner, 2, 3, **shared)

    def __call__(self, h_BhwC: Array) -> Array:
        return self.conv2(nnx.relu(self.conv1(h_BhwC)))


class UpdateBlock(nnx.Module):
    """What one refinement iteration evaluates, and the mask head of the large variant, evaluated after the last one."""

    def __init__(self, v: Variant, **shared: Any):
        self.encoder = MotionEncoder(v, **shared)
        self.gru = ConvGRU(v, **shared)
        self.flow_head = FlowHead(v.hidden, v.flow_head, **shared)
        if v.mask_head:
            relu = nnx.relu
            self.mask = nnx.List([_conv(v.hidden, v.mask_head, 3, **shared), relu, _conv(v.mask_head, 9 * CELL**2, 1, **shared)])


class RAFT(nnx.Module):
    """RAFT of one `variant` ("small", "large"). Convolutions run in `dtype`, float32 ones at `precision` on every backend.

    Norms, correlations, hidden state and positions are float32 whatever the dtype.
    Frames must be at least 64 pixels on a side; the authors' code needs 128 (at 64 its coarsest level divides by zero).
    """

    def __init__(self, variant: str, *, rngs: nnx.Rngs, precision: str = "highest", dtype: str = "float32"):
        if variant not in VARIANTS:
            raise ValueError(f"RAFT variant {variant!r}: must be one of {', '.join(VARIANTS)}")
        v = VARIANTS[variant]
        shared = {"rngs": rngs, "precision": precision, "dtype": jnp.dtype(dtype)}
        self.variant = variant
        self.fnet = Encoder(v, v.fnet_width, "instance", **shared)
        self.cnet = Encoder(v, v.hidden + v.context, "batch" if v.context_norm else "none", **shared)
        self.update_block = UpdateBlock(v, **shared)

    def features(self, frames_BHW3: Num[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Matching features of frames (0..255, sides multiples of 8) on the 1/8 grid."""
        return self.fnet(_centre(frames_BHW3)).astype(jnp.float32)

    def context(self, frames_BHW3: Num[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Context features of first frames: the initial hidden state (tanh) and the constant input (relu), concatenated."""
        hidden, context = jnp.split(self.cnet(_centre(frames_BHW3)).astype(jnp.float32), [VARIANTS[self.variant].hidden], -1)
        return jnp.concatenate([jnp.tanh(hidden), nnx.relu(context)], -1)

    def refine(
        self,
        first_BhwC: Float[Array, "B h w C"],
        second_BhwC: Float[Array, "B h w C"],
        context_BhwD: Float[Array, "B h w D"],
        iterations: int | Array,
    ) -> tuple[Float[Array, "B h w 2"], Float[Array, "B h w E"]]:
        """Flow in grid cells after `iterations` updates from zero, and the last hidden state, from `features` and `context`."""
        v, update = VARIANTS[self.variant], self.update_block
        h_BhwC, context = context_BhwD[..., : v.hidden], context_BhwD[..., v.hidden :]
        weights, constant = update.gru.weights(), update.gru.constant(context)
        encoder, flow_head = prepared(update.encoder), prepared(update.flow_head)
        pyramid = correlation_pyramid(first_BhwC, second_BhwC)
        _, h, w, _ = first_BhwC.shape
        grid_hw2 = jnp.stack(jnp.meshgrid(jnp.arange(w), jnp.arange(h)), -1).astype(jnp.float32)

        def iterate(_, carry):
            # Carrying the position, as the authors do, rounds the flow as they do.
            h_BhwC, position_Bhw2 = carry
            window = lookup(pyramid, position_Bhw2, v.radius)
            motion = encoder(position_Bhw2 - grid_hw2, window)
            h_BhwC = update.gru(h_BhwC, motion, weights, constant)
            return h_BhwC, position_Bhw2 + flow_head(h_BhwC)

        start = jnp.broadcast_to(grid_hw2, (*first_BhwC.shape[:3], 2))
        h_BhwC, position_Bhw2 = jax.lax.fori_loop(0, iterations, iterate, (h_BhwC, start))
        return position_Bhw2 - grid_hw2, h_BhwC

    def upsample(self, flow_Bhw2: Float[Array, "B h w 2"], h_BhwC: Float[Array, "B h w E"]) -> Float[Array, "B 8*h 8*w 2"]:
        """Flow in pixels at full resolution: bilinear (small), or the convex combination of the mask head (large)."""
        if self.variant == "small":
            return CELL * upsample_bilinear(flow_Bhw2)
        for layer in self.update_block.mask:
            h_BhwC = layer(h_BhwC)
        return CELL * upsample_convex(flow_Bhw2, 0.25 * h_BhwC.astype(jnp.float32))

    def __call__(
        self, first_BHW3: Num[Array, "B H W 3"], second_BHW3: Num[Array, "B H W 3"], iterations: int | Array = 12
    ) -> Float[Array, "B H W 2"]:
        """Full-resolution flow in pixels between frames (0..255) of any size from 64 x 64 up."""
        height, width = first_BHW3.shape[1:3]
        top, left, *_ = padding(height, width)
        first, second = pad(first_BHW3), pad(second_BHW3)
        features = jnp.split(self.features(jnp.concatenate([first, second])), 2)
        flow, h = self.refine(*features, self.context(first), iterations)
        return self.upsample(flow, h)[:, top : top + height, left : left + width]


def _centre(frames: Array) -> Array:
    return 2 * (frames.astype(jnp.float32) / 255) - 1


def padding(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) up to multiples of 8; an odd pixel goes to the bottom and right (the authors' mode 'sintel').

    Raises ValueError for frames under 64 pixels on a side.
    """
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"RAFT needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {height} x {width}; use larger clips")
    rows, columns = -height % CELL, -width % CELL
    return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2


def pad(frames_BHWC: Num[Array, "B H W C"]) -> Num[Array, "B H2 W2 C"]:
    """Frames with their border replicated up to multiples of 8, see `padding`."""
    top, left, bottom, right = padding(*frames_BHWC.shape[1:3])
    return jnp.pad(frames_BHWC, ((0, 0), (top, bottom), (left, right), (0, 0)), mode="edge")


def correlation_pyramid(first_BhwC: Float[Array, "B h w C"], second_BhwC: Float[Array, "B h w C"]) -> list[Float[Array, "B N h_l w_l"]]:
    """Dot products over sqrt(C) of every cell of the first map with every cell of the second, pooled 2x2 per level.

    The product is linear, so that pooling the second map replaces the paper's pooling of the (much larger) products. An odd last
    row or column is dropped, as there.
    """
    b, h, w, c = first_BhwC.shape
    first_BNC = first_BhwC.reshape(b, h * w, c) * c**-0.5
    levels = []
    for level in range(LEVELS):
        if level:
            rows, columns = second_BhwC.shape[1] // 2, second_BhwC.shape[2] // 2
            blocks = second_BhwC[:, : 2 * rows, : 2 * columns].reshape(b, rows, 2, columns, 2, c)
            second_BhwC = blocks.mean((2, 4))
        if platform() == "gpu":  # XLA would make one product of them all and copy every level out of it
            first_BNC, second_BhwC = jax.lax.optimization_barrier((first_BNC, second_BhwC))
        levels.append(jnp.einsum("bnc,byxc->bnyx", first_BNC, second_BhwC, precision="highest"))
    return levels


def lookup(pyramid: list[Float[Array, "B N h_l w_l"]], position_Bhw2: Float[Array, "B h w 2"], radius: int) -> Float[Array, "B h w C"]:
    """Bilinear windows of (2*radius + 1)^2 correlations around each cell's position (x, y in cells), level after level.

    Outside the map correlations are zero. Inside a window the slow index moves x and the fast one y, as in the authors' code.
    """
    b, h, w, _ = position_Bhw2.shape
    offsets_K = jnp.arange(-radius, radius + 2)
    windows = []
    for level, correlation in enumerate(pyramid):
        rows, columns = correlation.shape[2:]
        # All taps of a window share one fraction: read (2*radius + 2)^2 whole cells, blend neighbours in x, then in y.
        # The limits keep a diverged flow inside int32 and change nothing: beyond them the window is empty.
        limit = jnp.array([columns + radius + 1, rows + radius + 1], jnp.float32)
        position_BN2 = jnp.clip(position_Bhw2.reshape(b, h * w, 2) / 2**level, -radius - 2, limit)
        cell_BN2 = jnp.floor(position_BN2)
        fraction_BN2 = (position_BN2 - cell_BN2)[..., None, None]
        x_BNK, y_BNK = (cell_BN2[..., i, None].astype(jnp.int32) + offsets_K for i in range(2))
        index_BNKK = jnp.clip(x_BNK, 0, columns - 1)[..., :, None] + columns * jnp.clip(y_BNK, 0, rows - 1)[..., None, :]
        inside_BNKK = ((x_BNK >= 0) & (x_BNK < columns))[..., :, None] & ((y_BNK >= 0) & (y_BNK < rows))[..., None, :]
        flat = correlation.reshape(b, h * w, rows * columns)
        cells_BNKK = jnp.take_along_axis(flat, index_BNKK.reshape(b, h * w, -1), 2, mode="promise_in_bounds").reshape(index_BNKK.shape)
        cells_BNKK = jnp.where(inside_BNKK, cells_BNKK, 0)
        fx, fy = fraction_BN2[:, :, 0], fraction_BN2[:, :, 1]
        blended = (1 - fx) * cells_BNKK[:, :, :-1] + fx * cells_BNKK[:, :, 1:]
        blended = (1 - fy) * blended[..., :-1] + fy * blended[..., 1:]
        windows.append(blended.reshape(b, h, w, -1))
    return jnp.concatenate(windows, -1)


def upsample_bilinear(flow_BhwC: Float[Array, "B h w C"]) -> Float[Array, "B 8*h 8*w C"]:
    """x8 bilinear with the corner values kept on the corners (align_corners); values are not scaled."""

    def weights(n: int) -> Array:
        position = jnp.arange(CELL * n) * ((n - 1) / (CELL * n - 1))
        return nnx.relu(1 - jnp.abs(position[:, None] - jnp.arange(n)))

    rows, columns = weights(flow_BhwC.shape[1]), weights(flow_BhwC.shape[2])
    return jnp.einsum("yh,bhwc,xw->byxc", rows, flow_BhwC, columns, precision="highest")


def upsample_convex(flow_BhwC: Float[Array, "B h w C"], logits_BhwM: Float[Array, "B h w 576"]) -> Float[Array, "B 8*h 8*w C"]:
    """x8 where every fine pixel is a softmax-weighted mean of its coarse cell's 3x3 neighbours (zero outside); values are not scaled.

    Channels of the logits: 9 neighbours in row order, then 8 x 8 pixels of the cell.
    """
    b, h, w, c = flow_BhwC.shape
    weights = jax.nn.softmax(logits_BhwM.reshape(b, h, w, 9, CELL, CELL), 3)
    padded = jnp.pad(flow_BhwC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.stack([padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3)], 3)
    fine = jnp.einsum("bhwkyx,bhwkc->bhywxc", weights, neighbours, precision="highest")
    return fine.reshape(b, CELL * h, CELL * w, c)
