"""Scaled dot-product attention by each platform's fastest kernel, and the multi-head layer around it.

Attribute names are those of the reference checkpoint (VideoCrafter2), so that a weight has one path everywhere.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from motif_jax.errors import UserError
from motif_jax.models import along_frames, packed, splash
from motif_jax.models.layers import Dense, Initializer, gathered, product
from motif_jax.models.placement import CLIPS, ampere, constrain, kernels_on, platform

IMAGE_TOKENS = 16  # per frame, from DynamiCrafter's resampler
BLOCKWISE_FROM = 2**22  # query-key pairs of one head: 2560 pixels (a 320x512 frame) are beyond it, 1280 are not
QUERY_BLOCK = 512


def attention(
    q_NLHK: Float[Array, "N L H K"],
    k_NSHK: Float[Array, "N S H K"],
    v_NSHK: Float[Array, "N S H K"],
    implementation: str = "auto",
    causal: bool = False,
) -> Float[Array, "N L H K"]:
    """softmax(q k^T / sqrt(K)) v per head, softmax in float32; `causal` hides the keys after a query.

    implementation: "reference" is written out here; "xla" and "cudnn" are those of `jax.nn.dot_product_attention`; "splash" is TPU's kernel
    of that name among long sequences, else "xla"; among few tokens, an `Attention` with "cudnn" takes `models.packed`, and along time one
    with "splash" `models.along_frames`. "auto" takes cudnn on an NVIDIA GPU (`placement.ampere`) for half precision and head widths that
    cuDNN supports, splash on a TPU for half precision, reference on CPU, xla elsewhere.
    Where L * S is large, "reference" and "xla" take the queries in blocks and recompute each block's weights in the backward
    pass, so that memory does not grow with L * S. Raises ValueError for a name it does not know, or a kernel of another platform.
    """
    if implementation == "auto":
        implementation = _choose(q_NLHK.shape[-1], q_NLHK.dtype)
    if implementation == "cudnn":
        return _with_cudnn(q_NLHK, k_NSHK, v_NSHK, causal)
    if implementation == "splash":
        if platform() != "tpu":
            raise ValueError(f"attention='splash' is a TPU kernel and this is {platform()}; use 'auto'")
        if not causal and splash.fits(q_NLHK.shape, k_NSHK.shape, q_NLHK.dtype) and (attend := _splash_on_each_device(q_NLHK.shape)):
            return attend(q_NLHK, k_NSHK, v_NSHK)
        implementation = "xla"
    if implementation not in ("reference", "xla"):
        raise ValueError(f"attention={implementation!r}: must be one of 'auto', 'reference', 'xla', 'cudnn', 'splash'")
    old = platform() == "gpu" and not ampere()  # without the products in bfloat16 that "xla" asks for
    by_hand = implementation == "reference" or old
    attend = _reference if by_hand else functools.partial(jax.nn.dot_product_attention, implementation="xla")
    N, L, H, K = q_NLHK.shape
    block = max(size for size in range(1, QUERY_BLOCK + 1) if L % size == 0)
    if causal or L * k_NSHK.shape[1] <= BLOCKWISE_FROM or block < QUERY_BLOCK // 8:
        return attend(q_NLHK, k_NSHK, v_NSHK, is_causal=causal)
    q_MNlHK = jnp.moveaxis(q_NLHK.reshape(N, L // block, block, H, K), 1, 0)
    out_MNlHK = jax.lax.map(jax.checkpoint(lambda q: attend(q, k_NSHK, v_NSHK)), q_MNlHK)
    return jnp.moveaxis(out_MNlHK, 0, 1).reshape(q_NLHK.shape)


def missing_for(implementation: str, where: str) -> str | None:
    """Why `implementation` cannot run on platform `where`, the target of tracing; None if it can."""
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(implementation, where)
    if needed != where:
        return f"runs on {needed} and this is {where}"
    old = where == "gpu" and implementation == "cudnn" and not ampere()
    return "runs on NVIDIA GPUs of compute capability 8.0 and up" if old else None


def check_kernel(implementation: str, where: str) -> None:
    """Raises UserError when `implementation` cannot run on platform `where`."""
    if missing := missing_for(implementation, where):
        raise UserError(f"attention={implementation!r}: {missing}; use 'auto'")


def _on_each_device(attend: Callable, *arrays: Array) -> Array:
    """A kernel that XLA cannot partition, on each device's sequences and heads, [N, ..., H, K]; what does not divide is replicated."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(*arrays)
    rows, _ = _sequences_of_a_device(arrays[0].shape[0])
    heads = "tensor" if arrays[0].shape[-2] % mesh.shape["tensor"] == 0 else None
    specs = tuple(PartitionSpec(rows or None, *(None,) * (x.ndim - 3), heads) for x in arrays)
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(rows or None, None, heads), check_vma=False)(*arrays)


def _axes(n: int, *names: str) -> tuple[str, ...] | None:
    """These axes of the mesh, if n entries divide among them."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if n % math.prod(mesh.shape[name] for name in names) else names


def _splash_on_each_device(shape: tuple[int, ...]) -> Callable | None:
    """`splash.attend` for queries of this shape, on each device's sequences and heads.

    Of sequences that do not divide among all devices, `context` splits the queries; None where that does not work either.
    """
    mesh, (N, L, H, _) = jax.sharding.get_abstract_mesh(), shape
    if mesh.empty:
        return splash.attend
    rows, queries = _axes(N, *CLIPS, "context"), None
    if rows is None:
        rows, queries = _axes(N, *CLIPS), _axes(L, "context")
        if rows is None or queries is None:
            return None
    q, kv = (PartitionSpec(rows, along, _axes(H, "tensor")) for along in (queries, None))
    return jax.shard_map(splash.attend, mesh=mesh, in_specs=(q, kv, kv), out_specs=q, check_vma=False)


def _along_frames(heads: int, *qkv_BTPC: Array) -> Array:
    """`along_frames.attend` on each device's clips, pixels and heads; what does not divide is replicated."""
    B, _, P, C = qkv_BTPC[0].shape
    attend = functools.partial(along_frames.attend, C // heads)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(*qkv_BTPC)
    spec = PartitionSpec(_axes(B, *CLIPS), None, _axes(P, "context"), _axes(heads, "tensor"))
    return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*qkv_BTPC)


def _sequences_of_a_device(sequences: int) -> tuple[tuple[str, ...], int]:
    """(the mesh axes that this many sequences are split over, or none where they do not divide; how many a device then has)"""
    mesh = jax.sharding.get_abstract_mesh()
    # Also axes of one device: gradients would be added up over those that shard_map is not told of.
    rows = () if mesh.empty else ("data", "fsdp", "context")
    devices = math.prod(mesh.shape[name] for name in rows)
    return ((), sequences) if sequences % devices else (rows, sequences // devices)


def _with_cudnn(q_NLHK: Array, k_NSHK: Array, v_NSHK: Array, causal: bool) -> Array:
    """cuDNN's attention in the shapes that it takes, and takes well."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["context"]
    if parts > 1 and q_NLHK.shape[1] != k_NSHK.shape[1] and q_NLHK.shape[1] % parts == 0:
        apart = (constrain(x, (*CLIPS, "context"), None, "tensor", None) for x in _queries_apart(parts, q_NLHK, k_NSHK, v_NSHK))
        return _even_lengths(attend, *apart, causal).reshape(q_NLHK.shape)
    return _even_lengths(attend, q_NLHK, k_NSHK, v_NSHK, causal)


def _queries_apart(parts: int, q_NLHK: Array, k_NSHK: Array, v_NSHK: Array) -> tuple[Array, Array, Array]:
    """The queries of each sequence as `parts` sequences with the same keys: cuDNN's kernel is not split over `context` within one."""
    N, L, *heads = q_NLHK.shape
    return q_NLHK.reshape(N * parts, L // parts, *heads), k_NSHK.repeat(parts, 0), v_NSHK.repeat(parts, 0)


def _even_lengths(attend: Callable, q_NLHK: Array, k_NSHK: Array, v_NSHK: Array, is_causal: bool = False) -> Array:
    """`attend` on lengths made even by padding that it does not see: JAX differentiates cuDNN's kernels for no other, and text has 77."""
    lengths = q_NLHK.shape[1], k_NSHK.shape[1]
    if not any(n % 2 for n in lengths):
        return attend(q_NLHK, k_NSHK, v_NSHK, is_causal=is_causal)
    padded = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_NLHK, k_NSHK, v_NSHK))
    queries, keys = (jnp.full(len(q_NLHK), n, jnp.int32) for n in lengths)
    return attend(*padded, is_causal=is_causal, query_seq_lengths=queries, key_value_seq_lengths=keys)[:, : lengths[0]]


def _reference(q_NLHK: Array, k_NSHK: Array, v_NSHK: Array, is_causal: bool = False) -> Array:
    if q_NLHK.dtype == jnp.float32:
        return jnp.swapaxes(_heads_first(*(jnp.swapaxes(x, 1, 2) for x in (q_NLHK, k_NSHK, v_NSHK)), is_causal), 1, 2)
    # With the form above, or XLA's own, the golden U-Net in bfloat16 would be 2 % farther from float32.
    logits_NHLS = _logits(*(jnp.swapaxes(x, 1, 2) for x in (q_NLHK, k_NSHK)), is_causal)
    return jnp.einsum("NHLS,NSHK->NLHK", jax.nn.softmax(logits_NHLS, axis=-1).astype(v_NSHK.dtype), v_NSHK)


def _logits(q_NHLK: Array, k_NHSK: Array, is_causal: bool) -> Array:
    logits_NHLS = jnp.einsum("NHLK,NHSK->NHLS", q_NHLK, k_NHSK, preferred_element_type=jnp.float32) * q_NHLK.shape[-1] ** -0.5
    if is_causal:
        length, size = logits_NHLS.shape[-2:]
        logits_NHLS = jnp.where(jnp.arange(length)[:, None] >= jnp.arange(size), logits_NHLS, -jnp.inf)
    return logits_NHLS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _heads_first(q_NHLK: Array, k_NHSK: Array, v_NHSK: Array, is_causal: bool) -> Array:
    """Attention in float32 whose weights are written once and read twice: they are divided by their sum after the product with the values.

    The backward pass is FlashAttention's (Dao et al. 2022, appendix B.2): of the softmax it needs the row sums of gradient * output alone.
    """
    return _attend(q_NHLK, k_NHSK, v_NHSK, is_causal)[0]


def _attend(q_NHLK: Array, k_NHSK: Array, v_NHSK: Array, is_causal: bool) -> tuple[Array, tuple[Array, ...]]:
    logits_NHLS = _logits(q_NHLK, k_NHSK, is_causal)
    weights_NHLS = jnp.exp(logits_NHLS - logits_NHLS.max(-1, keepdims=True))
    total_NHL1 = weights_NHLS.sum(-1, keepdims=True)
    out_NHLK = jnp.einsum("NHLS,NHSK->NHLK", weights_NHLS, v_NHSK) / total_NHL1
    return out_NHLK, (q_NHLK, k_NHSK, v_NHSK, weights_NHLS, total_NHL1, out_NHLK)


def _attend_backward(is_causal: bool, saved: tuple[Array, ...], g_NHLK: Array) -> tuple[Array, Array, Array]:
    q_NHLK, k_NHSK, v_NHSK, weights_NHLS, total_NHL1, out_NHLK = saved
    scale = q_NHLK.shape[-1] ** -0.5

    def keys(a_NHLK: Array, b_NHLS: Array) -> Array:
        """a^T b, [N, H, S, K], with the long axis last in the product: XLA's CPU backend is slow at the other order."""
        return jnp.swapaxes(jnp.einsum("NHKL,NHLS->NHKS", jnp.swapaxes(a_NHLK, 2, 3), b_NHLS), 2, 3)

    g_NHLK = g_NHLK / total_NHL1
    dweights_NHLS = jnp.einsum("NHLK,NHSK->NHLS", g_NHLK, v_NHSK)
    dlogits_NHLS = weights_NHLS * (dweights_NHLS - (g_NHLK * out_NHLK).sum(-1, keepdims=True))
    dq_NHLK = jnp.einsum("NHLS,NHSK->NHLK", dlogits_NHLS, k_NHSK) * scale
    return dq_NHLK, keys(q_NHLK * scale, dlogits_NHLS), keys(g_NHLK, weights_NHLS)


_heads_first.defvjp(_attend, _attend_backward)


def _choose(width: int, dtype: Any) -> str:
    if ampere() and jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128:
        return "cudnn"
    if kernels_on(dtype, "tpu"):
        return "splash"
    return "reference" if platform() == "cpu" else "xla"


class Attention(nnx.Module):
    """Multi-head attention from x to `context` (to x itself without one); heads are the major part of the inner axis.

    Where it `takes_frames`, x may also be [B, T, P, C]: attention along T at each of P pixels.

    With `image`, a second set of keys and values reads image tokens, [M, I, D] with M a multiple of N: each of the M / N equal
    parts of L attends to its own tokens, and the result is added (DynamiCrafter's `to_k_ip`, `to_v_ip`); with `image_scale` it is
    weighed by tanh(alpha) + 1 first (its 256 model).
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_width: int,
        *,
        init: Initializer,
        dtype,
        implementation: str,
        image: bool = False,
        image_scale: bool = False,
    ):
        inner = heads * head_width
        self.to_q = Dense(width, inner, bias=False, init=init, dtype=dtype)
        self.to_k = Dense(context_width, inner, bias=False, init=init, dtype=dtype)
        self.to_v = Dense(context_width, inner, bias=False, init=init, dtype=dtype)
        if image:
            self.to_k_ip = Dense(context_width, inner, bias=False, init=init, dtype=dtype)
            self.to_v_ip = Dense(context_width, inner, bias=False, init=init, dtype=dtype)
        self.alpha = nnx.Param(jnp.zeros((), jnp.float32)) if image and image_scale else None
        self.to_out = nnx.List([Dense(inner, width, init=init, dtype=dtype)])
        self.heads, self.implementation = heads, implementation

    def __call__(
        self,
        x_NLC: Float[Array, "N L C"],
        context_NSD: Float[Array, "N S D"] | None = None,
        image_MID: Float[Array, "M I D"] | None = None,
    ) -> Float[Array, "N L C"]:
        products = [product(x_NLC.astype(self.to_q.dtype), kernel) for kernel in self.kernels(x_NLC.shape, context_NSD, image_MID)]
        return self.to_out[0](self._heads(products, context_NSD, image_MID))

    @property
    def bias(self) -> nnx.Param:
        """[C], of the last layer."""
        return self.to_out[0].bias

    def kernels(self, shape: tuple[int, ...], context_NSD: Array | None = None, image_MID: Array | None = None) -> list[Array]:
        """What x [N, L, C] of this shape is multiplied by, for `from_products`.

        Queries, keys and values of few tokens are one product: three of them would read x, and add up its gradient, three times.
        """
        layers = [self.to_q, self.to_k, self.to_v] if context_NSD is None else [self.to_q]
        kernels = [gathered(layer.kernel, layer.dtype) for layer in layers]
        return [jnp.stack(kernels, 1)] if context_NSD is None and image_MID is None and self._packed(shape) else kernels

    def from_products(
        self, products: list[Array], context_NSD: Array | None = None, image_MID: Array | None = None
    ) -> Float[Array, "N L C"]:
        """As `__call__`, from the products of x, for what adds `bias` itself."""
        return self.to_out[0].without_bias(self._heads(products, context_NSD, image_MID))

    @property
    def _chosen(self) -> tuple[str, int, Any]:
        """(implementation, width of a head, dtype)"""
        width, dtype = self.to_q.kernel.shape[-1] // self.heads, self.to_q.dtype
        return _choose(width, dtype) if self.implementation == "auto" else self.implementation, width, dtype

    def _packed(self, shape: tuple[int, ...]) -> bool:
        chosen, width, dtype = self._chosen
        return chosen == "cudnn" and kernels_on(dtype) and packed.fits(_sequences_of_a_device(shape[0])[1], shape[1], width)

    def takes_frames(self, T: int, P: int) -> bool:
        """Whether x may be [B, T, P, C]: on a TPU, where `models.along_frames` takes what each device has of it."""
        chosen, _, dtype = self._chosen
        mesh = jax.sharding.get_abstract_mesh()
        parts = 1 if mesh.empty or P % mesh.shape["context"] else mesh.shape["context"]
        return chosen == "splash" and kernels_on(dtype, "tpu") and along_frames.fits(T, P // parts)

    def _heads(self, products: list[Array], context_NSD: Array | None, image_MID: Array | None) -> Float[Array, "N L I"]:
        """The heads' results side by side."""

        def split(a):
            return a.reshape(*a.shape[:-1], self.heads, -1)

        if len(products) == 3 and products[0].ndim == 4:
            return _along_frames(self.heads, *products)
        if products[0].ndim == 4:
            out = _on_each_device(packed.attend, split(products[0]))
            return out.reshape(*out.shape[:-2], -1)
        q, *k_v = map(split, products)
        k, v = k_v or (split(self.to_k(context_NSD)), split(self.to_v(context_NSD)))
        out = attention(q, k, v, self.implementation)
        if image_MID is not None:
            parts = q.reshape(image_MID.shape[0], -1, *q.shape[2:])
            image = attention(parts, split(self.to_k_ip(image_MID)), split(self.to_v_ip(image_MID)), self.implementation)
            scale = 1.0 if self.alpha is None else (jnp.tanh(self.alpha[...]) + 1.0).astype(out.dtype)
            out = out + scale * image.reshape(out.shape)
        return out.reshape(*out.shape[:-2], -1)
