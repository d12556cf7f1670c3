"""`attention_fn` for flax.nnx.MultiHeadAttention and flax.linen.MultiHeadDotProductAttention."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array

from jax_flashattn import _jax_masks
from jax_flashattn._reference import masked_attention
from jax_flashattn._validate import check_arrays
from jax_flashattn.api import flash_attention


# linen drops every keyword that is not a named parameter, nnx passes all of them: so each one is
# named here, and what cannot be honoured is refused.
def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
    input_positions: Any = None,
) -> Array:
    """Flash attention with the call signature of Flax's dot_product_attention.

    A mask is checked as the program runs: if it hides keys before and after one run per row, the
    same for every head (causal, padding, windows, packed documents), the kernel computes it;
    any other mask takes plain XLA attention with the same result. Prefer is_causal to a mask:
    nothing of size q x k exists then. linen never passes is_causal; use
    functools.partial(attention_fn, is_causal=True).

    Args:
      query: [*batch, q, heads, d].
      key: [*batch, k, kv_heads, d]; kv_heads divides heads.
      value: [*batch, k, kv_heads, dv].
      bias: not supported yet.
      mask: bool or float, broadcastable to [*batch, heads, q, k]; nonzero means visible. A row that
        sees nothing gives 0 (Flax gives the mean of the values).
      broadcast_dropout: has no effect without dropout.
      dropout_rng: has no effect without dropout.
      dropout_rate: not supported yet unless deterministic.
      deterministic: no dropout.
      dtype: dtype to compute in; default, the common one of the inputs.
      precision: any is accepted: products are exact for 16-bit inputs and full float32 otherwise.
      module: the module to sow "attention_weights" into; this needs O(q k) memory.
      force_fp32_for_softmax: the softmax is always float32 (float64 for float64).
      einsum_dot_general: must be None.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.
      promote_dtype: function ((query, key, value), dtype=dtype) that casts; default, Flax's.
      is_causal: row i sees keys up to i (top-left aligned, as in Flax and jax.nn).
      input_positions: must be None; rotate query and key before the call.

    Returns:
      [*batch, q, heads, dv] in the computation dtype.

    Raises:
      NotImplementedError: for an argument that must be None or is not supported yet.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jax_flashattn.flax import attention_fn
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=32, num_kv_heads=2, decode=False,
      ...     attention_fn=attention_fn, rngs=nnx.Rngs(0))
      >>> layer(jax.numpy.ones((2, 10, 32)), is_causal=True).shape
      (2, 10, 32)
    """
    del broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax
    _refuse(
        bias=bias,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
        input_positions=input_positions,
    )
    if dropout_rate != 0.0 and not deterministic:
        raise NotImplementedError(
            f"attention_fn does not support dropout yet, got dropout_rate={dropout_rate}; use "
            "deterministic=True or dropout_rate=0."
        )
    promote = promote_dtype or dtypes.promote_dtype
    query, key, value = promote((query, key, value), dtype=dtype)

    batch = query.shape[:-3]
    flat = [x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)]
    query, key, value = check_arrays(*flat)
    if mask is not None:
        heads, sq, sk = query.shape[2], query.shape[1], key.shape[1]
        mask = _batched_mask(mask, batch, heads, sq, sk)
    if module is None:
        out = _attend(query, key, value, mask, is_causal)
    else:
        out, weights = _attend_with_weights(query, key, value, mask, is_causal)
        collection = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
        module.sow(collection, "attention_weights", weights.reshape(*batch, *weights.shape[1:]))
    return out.reshape(*batch, *out.shape[1:])


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"attention_fn does not support {name} yet; it must be None.")


def _batched_mask(mask: Array, batch: tuple[int, ...], heads: int, sq: int, sk: int) -> Array:
    """As bool [b or 1, heads or 1, sq, sk]."""
    mask = jnp.asarray(mask).astype(bool)
    mask = mask.reshape(*(1,) * (len(batch) + 3 - mask.ndim), *mask.shape)
    try:
        jnp.broadcast_shapes(mask.shape, (*batch, heads, sq, sk))
    except ValueError:
        raise ValueError(
            f"mask must be broadcastable to [*batch, heads, q, k] = {(*batch, heads, sq, sk)}, "
            f"got shape {mask.shape}."
        ) from None
    per_batch = any(n != 1 for n in mask.shape[: len(batch)])
    lead = batch if per_batch else (1,) * len(batch)
    mask = jnp.broadcast_to(mask, (*lead, mask.shape[-3], sq, sk))
    return mask.reshape(math.prod(lead), *mask.shape[len(batch) :])


def _attend(query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool) -> Array:
    sq, sk = query.shape[1], key.shape[1]
    if mask is None and (not is_causal or sq == sk):  # then top-left is bottom-right
        return flash_attention(query, key, value, causal=is_causal)
    limits = _jax_masks.top_left(sq, sk, None, 0) if is_causal else None
    if mask is None:
        return flash_attention(query, key, value, mask=limits)
    return _jax_masks.attend(query, key, value, mask, limits)[0]


def _attend_with_weights(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool
) -> tuple[Array, Array]:
    sq, sk = query.shape[1], key.shape[1]
    visible = jnp.ones((1, 1, sq, sk), bool) if mask is None else mask
    if is_causal:
        visible = visible & _jax_masks.top_left(sq, sk, None, 0).materialize(sk)[:, None]
    out, _, weights = masked_attention(query, key, value, visible, query.shape[-1] ** -0.5)
    return out, weights.astype(query.dtype)
