"""What the layers of a transformer add up, and its layer norms; on a GPU a norm is one Triton kernel forward and one backward.

XLA reads what a norm normalises twice forward and three times backward: sums over channels are kernels of their own, and so is the sum over
tokens for the bias of the layer before. Here a program holds whole tokens (Ba et al. 2016):

    w = (x - mean) / sqrt(variance + epsilon);  y = scale w + bias;  dx = dx' + (scale dy - mean(scale dy) - w mean(scale dy w)) / sqrt(...)

with dx' the gradient of x from what comes after. The float32 sum x itself is never written: kernels add up its parts again.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from motif_jax.models.layers import Conv, Dense, LayerNorm, interpreted, kernel_rows

ELEMENTS = 4096  # tokens times channels that a program has in registers at a time, at most
TURNS = 16  # at most; a program of the backward pass takes them to add up over tokens in registers

Part = tuple[Array, Array]  # a layer's product [N, L, C] and its bias [C]


class Residual:
    """The sum of layers' results [N, L, C], in float32; it begins with layer(x).

    rows: the mesh axes that its sequences lie over, for the kernels (where no GPU is, very slowly); None: no kernels; "auto": whichever
    it is here (`layers.kernel_rows`).
    """

    def __init__(self, layer: Dense | Conv, x: Float[Array, "N L I"], rows: tuple[str, ...] | str | None = "auto"):
        self.shape = (*x.shape[:-1], layer.kernel.shape[-1])
        self.rows = rows if rows != "auto" else kernel_rows(self.shape[0], layer.dtype) if fits(self.shape) else None
        self.total, self.newest, self.before = None, None, []
        self.add(layer, x)

    def add(self, layer: nnx.Module, *args: Array | None) -> None:
        """Adds layer(*args), whose axes before the last may be those of the sum in another shape; it has `bias` and `without_bias`."""
        if self.rows is None:
            y = layer(*args).reshape(self.shape).astype(jnp.float32)
            self.total = y if self.total is None else self.total + y
            return
        self._settle()
        self.newest = layer.without_bias(*args).reshape(self.shape), layer.bias[...]

    def normed(self, norm: LayerNorm) -> Float[Array, "N L C"]:
        """The sum's layer norm."""
        if self.newest is None:
            return norm(self.sum)
        normalise = _on_each_device(norm.epsilon, jnp.dtype(norm.dtype).name, self.rows, len(self.before))
        y, self.total = normalise(self.total, self.newest, tuple(self.before), norm.scale[...], norm.bias[...])
        self._read_again()
        return y

    @property
    def sum(self) -> Float[Array, "N L C"]:
        """The sum itself."""
        self._settle()
        return self.total

    def _settle(self) -> None:
        if self.newest is not None:
            self.total = _sum(self.total, self.newest)
            self._read_again()

    def _read_again(self) -> None:
        """The newest part is in the total; kernels still add it up by themselves, and its gradient has its way."""
        self.before.append(jax.lax.stop_gradient(self.newest))
        self.newest = None


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernels take [N, L, C] of this shape: whole programs, and channels in a few powers of two."""
    tokens, channels = math.prod(shape[:-1]), shape[-1]
    return channels % 16 == 0 and channels // (channels & -channels) <= 7 and math.prod(_tokens(tokens, channels)) >= TURNS


def _tokens(tokens: int, channels: int) -> tuple[int, int]:
    """(tokens at a time, times) of a program: powers of two that divide all of them."""
    power = tokens & -tokens
    rows = min(power, 1 << (ELEMENTS // channels).bit_length() >> 1)
    return rows, min(power // rows, TURNS) if rows else 0


def _on_each_device(epsilon: float, dtype: str, rows: tuple[str, ...], before: int) -> Callable[..., tuple[Array, Array]]:
    """`_normalise` on the sequences of each device."""
    call = functools.partial(_normalise, epsilon, dtype)
    if not rows:
        return call
    split, whole = PartitionSpec(rows), PartitionSpec()
    part = (split, whole)
    specs = {"in_specs": (split, part, (part,) * before, whole, whole), "out_specs": (split, split)}
    return jax.shard_map(call, mesh=jax.sharding.get_abstract_mesh(), check_vma=False, **specs)


def _sum(total: Array | None, part: Part) -> Array:
    y = part[0].astype(jnp.float32) + part[1]
    return y if total is None else total + y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(epsilon: float, dtype: str, total: Array | None, newest: Part, before: tuple[Part, ...], scale: Array, bias: Array):
    """(norm of the sum, the sum): `total` is that of `before`, which gradients do not go to; on one device."""
    return _normalise_and_save(epsilon, dtype, total, newest, before, scale, bias)[0]


def _normalise_and_save(epsilon: float, dtype: str, total: Array | None, newest: Part, before: tuple[Part, ...], scale: Array, bias: Array):
    (y,) = _run(functools.partial(_forward, epsilon), (*before, newest), [scale, bias], [], [dtype])
    return (y, _sum(total, newest)), (newest, before, scale)


def _gradients(epsilon: float, dtype: str, saved: tuple, g: tuple[Array, Array]):
    newest, before, scale = saved
    kernel, outputs = functools.partial(_backward, epsilon), [newest[0].dtype, jnp.float32][: 2 if before else 1]
    *dx, dscale, dbias, dpart = _run(kernel, (*before, newest), [scale], [g[0].astype(dtype), g[1]], [*outputs, None, None, None])
    return dx[1] if before else None, (dx[0], dpart), jax.tree.map(jnp.zeros_like, before), dscale, dbias


_normalise.defvjp(_normalise_and_save, _gradients)


def _run(kernel: Callable, parts: Sequence[Part], channels: Sequence[Array], arrays: Sequence[Array], outputs: Sequence) -> list[Array]:
    """`kernel`(parts, biases, channels, arrays, outputs) by whole tokens; of `outputs` None is a sum over tokens."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    shape = parts[0][0].shape
    N, C = math.prod(shape[:-1]), shape[-1]
    at_once, turns = _tokens(N, C)
    rows = at_once * (turns if None in outputs else min(turns, 2))
    tokens, row = pallas.BlockSpec((rows, C), lambda i: (i, 0)), pallas.BlockSpec((1, C), lambda i: (0, 0))
    sums = pallas.BlockSpec((None, 1, C), lambda i: (i, 0, 0))
    counts = [len(parts), len(parts), len(channels), len(arrays), len(outputs)]
    found = pallas.pallas_call(
        functools.partial(_grouped, functools.partial(kernel, at_once), counts),
        grid=(N // rows,),
        in_specs=[*[tokens] * len(parts), *[row] * (len(parts) + len(channels)), *[tokens] * len(arrays)],
        out_specs=[sums if dtype is None else tokens for dtype in outputs],
        out_shape=[
            jax.ShapeDtypeStruct((N // rows, 1, C), jnp.float32) if dtype is None else jax.ShapeDtypeStruct((N, C), dtype)
            for dtype in outputs
        ],
        name=f"layer_norm{kernel.func.__name__}",  # as traces show it
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpreted(),
    )(
        *(part.reshape(N, C) for part, _ in parts),
        *(bias.astype(jnp.float32)[None] for _, bias in parts),
        *(x[None] for x in channels),
        *(x.reshape(N, C) for x in arrays),
    )
    return [x.sum((0, 1)) if dtype is None else x.reshape(shape) for x, dtype in zip(found, outputs, strict=True)]


def _grouped(kernel: Callable, counts: Sequence[int], *refs) -> None:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    kernel(*(refs[end - count : end] for count, end in zip(counts, ends, strict=True)))


def _slices(ref) -> list[slice]:
    """The channels in powers of two, as Triton has its arrays."""
    C = ref.shape[-1]
    width = C & -C
    return [slice(i, i + width) for i in range(0, C, width)]


def _mean(x: Sequence[Array], C: int) -> Array:
    return sum(x[1:], x[0]).sum(1, keepdims=True) / C


def _whitened(epsilon: float, parts, biases, rows: slice, where: Sequence[slice]) -> tuple[list[Array], Array]:
    """(w slice by slice, 1 / sqrt(variance + epsilon)) of these tokens."""
    C = parts[0].shape[-1]
    x = [sum(part[rows, s].astype(jnp.float32) + bias[:, s] for part, bias in zip(parts, biases, strict=True)) for s in where]
    mean = _mean(x, C)
    x = [a - mean for a in x]
    rate = jax.lax.rsqrt(_mean([a * a for a in x], C) + epsilon)
    return [a * rate for a in x], rate


def _forward(epsilon: float, at_once: int, parts, biases, channels, arrays, outputs) -> None:
    (scale, bias), (y,) = channels, outputs
    where = _slices(y)
    w, _ = _whitened(epsilon, parts, biases, slice(None), where)
    for s, a in zip(where, w, strict=True):
        y[:, s] = (a * scale[:, s] + bias[:, s]).astype(y.dtype)


def _backward(epsilon: float, at_once: int, parts, biases, channels, arrays, outputs) -> None:
    from jax.experimental import pallas

    (scale,), (dy, rest), (*dx, dscale, dbias, dpart) = channels, arrays, outputs
    where, C = _slices(rest), rest.shape[-1]

    def turn(i: Array, sums: list[list[Array]]) -> list[list[Array]]:
        rows = pallas.ds(i * at_once, at_once)
        w, rate = _whitened(epsilon, parts, biases, rows, where)
        g = [dy[rows, s].astype(jnp.float32) for s in where]
        moved = [a * b for a, b in zip(g, w, strict=True)]
        scaled = [a * scale[:, s] for s, a in zip(where, g, strict=True)]
        mean, slope = _mean(scaled, C), _mean([a * b for a, b in zip(scaled, w, strict=True)], C)
        d = [rest[rows, s] + rate * (a - mean - b * slope) for s, a, b in zip(where, scaled, w, strict=True)]
        for s, a in zip(where, d, strict=True):
            for out in dx:
                out[rows, s] = a.astype(out.dtype)
        return [[total + a for total, a in zip(*pair, strict=True)] for pair in zip(sums, (moved, g, d), strict=True)]

    zeros = [[jnp.zeros((at_once, s.stop - s.start), jnp.float32) for s in where] for _ in range(3)]
    for out, totals in zip((dscale, dbias, dpart), jax.lax.fori_loop(0, rest.shape[0] // at_once, turn, zeros), strict=True):
        for s, total in zip(where, totals, strict=True):
            out[:, s] = total.sum(0, keepdims=True)
