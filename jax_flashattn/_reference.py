"""Attention as on paper, in O(sq sk) memory: to read, to test against, and to differentiate freely.

The softmax runs in float32 (float64 for float64 inputs), whatever the input dtype.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _mask
from jax_flashattn._spec import AttentionSpec
from jax_flashattn._validate import Operands


def visible_keys(operands: Operands, spec: AttentionSpec) -> Array:
    """The boolean matrix [b or 1, sq, sk] of who sees whom."""
    sq, sk = operands.query.shape[1], operands.key.shape[1]
    if operands.lo is not None and operands.hi is not None:
        return _mask.visible(operands.lo, operands.hi, sk)
    limits = _mask.arithmetic_intervals(sq, sk, spec.left, spec.right, operands.lengths)
    return _mask.visible(*limits, sk)


def masked_attention(
    query: Array, key: Array, value: Array, visible: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Output [b, sq, hq, dv], log-sum-exp [b, hq, sq] and probabilities [b, hq, sq, sk].

    Args:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv].
      visible: bool [b or 1, hq or 1, sq, sk].
      scale: factor on the scores.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    group = query.shape[2] // max(key.shape[2], 1)
    # What sees or is seen by nobody cannot matter, not even as 0 * NaN (S13).
    seen = visible.any((1, 2))[:, :, None, None]
    seeing = visible.any((1, 3))[:, :, None, None]
    query = jnp.where(seeing, query, 0)
    key = jnp.repeat(jnp.where(seen, key, 0), group, axis=2).astype(wide)
    value = jnp.repeat(jnp.where(seen, value, 0), group, axis=2).astype(wide)

    score = scale * jnp.einsum("bqhd,bkhd->bhqk", query.astype(wide), key, precision="highest")
    score = jnp.where(visible, score, -jnp.inf)
    # The maximum cancels, so it needs no gradient: it only keeps exp in range.
    largest = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weight = jnp.where(visible, jnp.exp(score - largest), 0)
    total = weight.sum(-1, keepdims=True)
    sees_any = visible.any(-1, keepdims=True)
    probability = weight / jnp.where(sees_any, total, 1)
    out = jnp.einsum("bhqk,bkhd->bqhd", probability, value, precision="highest")
    lse = jnp.where(sees_any, largest + jnp.log(jnp.where(sees_any, total, 1)), -jnp.inf)  # S11
    return out.astype(query.dtype), lse[..., 0], probability


def reference_attention(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and log-sum-exp [b, hq, sq] of a prepared call."""
    out, lse, _ = masked_attention(
        operands.query,
        operands.key,
        operands.value,
        visible_keys(operands, spec)[:, None],
        spec.scale,
    )
    return out, lse
