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
from jaxtyping import Array, Float

from motif_jax.models.layers import Conv, Dense, LayerNorm
from motif_jax.models.placement import Axis, constrain, interpreted, kernel_rows, on_each_device

ELEMENTS = 4096  # tokens times channels that a program has in registers at a time, at most
TURNS = 16  # at most; a program of the backward pass takes them to add up over tokens in registers

Part = tuple[Array, Array]  # a layer's result [N, L, C] without its bias, and that, [C]


class Residual:
    """The sum of layers' results [N, L, C], in float32; it begins with layer(x).

    rows: the mesh axes that its sequences lie over, for the kernels; None: no kernels; "auto": what `placement.kernel_rows` says.
    Without a GPU the kernels run in Pallas' interpreter, very slowly.
    axes: without kernels, the mesh axes that each axis of the sum, which may then have more, is to be split over (`placement.constrain`).
    """

    def __init__(
        self,
        layer: Dense | Conv,
        x: Float[Array, "N L I"],
        rows: tuple[str, ...] | str | None = "auto",
        axes: tuple[Axis, ...] | None = None,
    ):
        self.shape = (*x.shape[:-1], layer.kernel.shape[-1])
        self.axes = axes
        self.rows = rows if rows != "auto" else kernel_rows(self.shape[0], layer.dtype) if fits(self.shape) else None
        self.total, self.before = None, ()  # what the kernels have added up, and its parts
        if self.rows is None:
            self.total = self._placed(layer(x).astype(jnp.float32))
        else:
            self.newest = layer.without_bias(x), layer.bias[...]

    def add(self, layer: nnx.Module, norm: LayerNorm, *args: Array | None, lead: tuple[int, ...] = ()) -> None:
        """Adds layer(norm(sum), *args); `lead`: the layer's leading shape, if it differs from the sum's.

        The layer has `kernels`, which its input is multiplied by, `from_products`, which goes on from there, and `bias`.
        """
        lead = lead or self.shape[:-1]
        if self.rows is None:
            y = layer(self._placed(norm(self.total)).reshape(*lead, -1), *args)
            self.total = self._placed(self.total + y.reshape(self.shape).astype(jnp.float32))
            return
        kernels = tuple(layer.kernels((*lead, self.shape[-1]), *args))
        norm_parameters = norm.scale[...], norm.bias[...]
        products, self.total = _products(norm.epsilon, self.rows, self.total, self.newest, self.before, norm_parameters, kernels)
        # The newest part is in the total; kernels still add it up by themselves, but its gradient has gone its way.
        self.before = (*self.before, jax.lax.stop_gradient(self.newest))
        y = layer.from_products([x.reshape(*lead, *x.shape[2:]) for x in products], *args)
        self.newest = y.reshape(self.shape), layer.bias[...]

    def _placed(self, x: Array) -> Array:
        return x if self.axes is None else constrain(x, *self.axes)

    @property
    def sum(self) -> Float[Array, "N L C"]:
        """The sum itself."""
        return self.total if self.rows is None else _sum(self.total, self.newest)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernels take [N, L, C] of this shape: whole programs, and channels in a few powers of two."""
    tokens, channels = math.prod(shape[:-1]), shape[-1]
    return channels % 16 == 0 and channels // (channels & -channels) <= 7 and math.prod(_tokens(tokens, channels)) >= TURNS


def _tokens(tokens: int, channels: int) -> tuple[int, int]:
    """(tokens at a time, times) of a program: powers of two that divide all of them."""
    power = tokens & -tokens
    rows = min(power, 1 << (ELEMENTS // channels).bit_length() >> 1)
    return rows, min(power // rows, TURNS) if rows else 0


def _sum(total: Array | None, part: Part) -> Array:
    y = part[0].astype(jnp.float32) + part[1]
    return y if total is None else total + y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(
    epsilon: float, rows: tuple[str, ...], total: Array | None, newest: Part, before: tuple[Part, ...], norm: Part, kernels: tuple
):
    """(products of the sum's norm with `kernels` [C, ...], the sum): `total` is that of `before`, which gradients do not go to.

    The backward pass needs the norm itself for the gradients of `kernels`: the kernel that computes the sum's gradient returns it.
    """
    return _products_and_save(epsilon, rows, total, newest, before, norm, kernels)[0]


def _products_and_save(epsilon: float, rows: tuple[str, ...], total: Array | None, newest: Part, before: tuple, norm: Part, kernels: tuple):
    (y,) = _on_each_device(rows, functools.partial(_forward, epsilon), (*before, newest), norm, (), [newest[0].dtype])
    products = tuple(jax.lax.dot_general(y, kernel, (((2,), (0,)), ((), ()))) for kernel in kernels)
    return (products, _sum(total, newest)), (newest, before, norm, kernels)


def _gradients(epsilon: float, rows: tuple[str, ...], saved: tuple, g: tuple[tuple[Array, ...], Array]):
    newest, before, norm, kernels = saved
    inner = [(tuple(range(2, x.ndim)), tuple(range(1, k.ndim))) for x, k in zip(g[0], kernels, strict=True)]
    dy = [jax.lax.dot_general(x, k, (axes, ((), ()))) for x, k, axes in zip(g[0], kernels, inner, strict=True)]
    half, kernel = newest[0].dtype, functools.partial(_backward, epsilon, len(dy))
    outputs = [half, half, *[jnp.float32] * bool(before), None, None, None]
    y, *dx, dscale, dbias, dpart = _on_each_device(rows, kernel, (*before, newest), norm, (*dy, g[1]), outputs)
    dkernels = tuple(jax.lax.dot_general(y, x, (((0, 1), (0, 1)), ((), ()))) for x in g[0])
    return dx[1] if before else None, (dx[0], dpart), jax.tree.map(jnp.zeros_like, before), (dscale, dbias), dkernels


_products.defvjp(_products_and_save, _gradients)


def _on_each_device(rows: tuple[str, ...], kernel: Callable, parts: tuple[Part, ...], norm: Part, arrays: tuple[Array, ...], outputs: list):
    """`_run` on the sequences of each device."""

    def call(parts: tuple[Part, ...], norm: Part, arrays: tuple[Array, ...]) -> list[Array]:
        found = _run(kernel, parts, norm, arrays, outputs)
        return [jax.lax.psum(x, rows) if dtype is None and rows else x for x, dtype in zip(found, outputs, strict=True)]

    inputs = ((True, False),) * len(parts), (False, False), (True,) * len(arrays)
    return on_each_device(call, rows, inputs, [dtype is not None for dtype in outputs])(parts, norm, arrays)


def _run(kernel: Callable, parts: tuple[Part, ...], channels: Part, arrays: tuple[Array, ...], outputs: list) -> list[Array]:
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


def _backward(epsilon: float, products: int, at_once: int, parts, biases, channels, arrays, outputs) -> None:
    from jax.experimental import pallas

    (scale, bias), rest, (y, *dx, dscale, dbias, dpart) = channels, arrays[products], outputs
    where, C = _slices(rest), rest.shape[-1]

    def turn(i: Array, sums: list[list[Array]]) -> list[list[Array]]:
        rows = pallas.ds(i * at_once, at_once)
        w, rate = _whitened(epsilon, parts, biases, rows, where)
        g = [sum(dy[rows, s].astype(jnp.float32) for dy in arrays[:products]) for s in where]
        moved = [a * b for a, b in zip(g, w, strict=True)]
        scaled = [a * scale[:, s] for s, a in zip(where, g, strict=True)]
        mean, slope = _mean(scaled, C), _mean([a * b for a, b in zip(scaled, w, strict=True)], C)
        d = [rest[rows, s] + rate * (a - mean - b * slope) for s, a, b in zip(where, scaled, w, strict=True)]
        for s, a, b in zip(where, d, w, strict=True):
            y[rows, s] = (b * scale[:, s] + bias[:, s]).astype(y.dtype)
            for out in dx:
                out[rows, s] = a.astype(out.dtype)
        return [[total + a for total, a in zip(*pair, strict=True)] for pair in zip(sums, (moved, g, d), strict=True)]

    zeros = [[jnp.zeros((at_once, s.stop - s.start), jnp.float32) for s in where] for _ in range(3)]
    for out, totals in zip((dscale, dbias, dpart), jax.lax.fori_loop(0, rest.shape[0] // at_once, turn, zeros), strict=True):
        for s, total in zip(where, totals, strict=True):
            out[:, s] = total.sum(0, keepdims=True)
