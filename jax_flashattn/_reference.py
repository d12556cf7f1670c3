"""Attention as on paper, in O(sq sk) memory: to read, to test against, and to differentiate freely.

The softmax runs in float32 (float64 for float64 inputs), whatever the input dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _dropout, _mask
from jax_flashattn._operands import Operands, statistics_dtype
from jax_flashattn._spec import AttentionSpec
from jax_flashattn._validate import row_limits, row_positions


def visible_keys(operands: Operands, spec: AttentionSpec) -> Array:
    """The boolean matrix [b or 1, sq, sk] of who sees whom."""
    return _mask.visible(*row_limits(operands, spec), operands.key.shape[1])


class Extras(NamedTuple):
    """What a call does to its scores and probabilities beyond mask and scale.

    softcap, 0 for none; `added` to the scores behind it, `keep` of dropout, both broadcast to
    [b, hq, sq, sk]; kept_scale; sinks [b, hq].
    """

    softcap: float = 0.0
    added: Array | None = None
    keep: Array | None = None
    kept_scale: float = 1.0
    sinks: Array | None = None


NOTHING = Extras()


def masked_attention(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    scale: float,
    extras: Extras = NOTHING,
) -> tuple[Array, Array, Array]:
    """Output [b, sq, hq, dv], log-sum-exp [b, hq, sq] and probabilities [b, hq, sq, sk].

    Args:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv].
      visible: bool [b or 1, hq or 1, sq, sk].
      scale: factor on the scores.
      extras: features; the probabilities returned are those before dropout.
    """
    wide = statistics_dtype(query.dtype)
    group = query.shape[2] // max(key.shape[2], 1)
    # What sees or is seen by nobody cannot matter, not even as 0 * NaN (S13).
    seen = visible.any((1, 2))[:, :, None, None]
    seeing = visible.any((1, 3))[:, :, None, None]
    query = jnp.where(seeing, query, 0)
    key = jnp.repeat(jnp.where(seen, key, 0), group, axis=2).astype(wide)
    value = jnp.repeat(jnp.where(seen, value, 0), group, axis=2).astype(wide)

    score = scale * jnp.einsum("bqhd,bkhd->bhqk", query.astype(wide), key, precision="highest")
    if extras.softcap:
        score = extras.softcap * jnp.tanh(score / extras.softcap)
    if extras.added is not None:
        score = score + extras.added.astype(wide)
    score = jnp.where(visible, score, -jnp.inf)
    # The maximum cancels, so it needs no gradient: it only keeps exp in range.
    largest = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf))
    sees_any, sinks = visible.any(-1, keepdims=True), None
    if extras.added is not None:  # S11: -inf in a bias may hide everything
        sees_any = sees_any & ~jnp.isneginf(largest)
    if extras.sinks is not None:
        sinks = extras.sinks[:, :, None, None].astype(wide)
        largest = jnp.maximum(largest, jax.lax.stop_gradient(sinks))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weight = jnp.where(visible, jnp.exp(score - largest), 0)
    total = weight.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - largest)
    probability = weight / jnp.where(sees_any, total, 1)
    kept = probability
    if extras.keep is not None:
        kept = jnp.where(extras.keep, probability * extras.kept_scale, 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", kept, value, precision="highest")
    lse = jnp.where(sees_any, largest + jnp.log(jnp.where(sees_any, total, 1)), -jnp.inf)  # S11
    return out.astype(query.dtype), lse[..., 0], probability


def _coordinates(operands: Operands) -> tuple[Array, Array]:
    """Aligned key coordinates of rows [b or 1, sq] and coordinates of keys [b or 1, sk]."""
    key = jnp.arange(operands.key.shape[1], dtype=jnp.int32)[None]
    if operands.key_coordinates is not None:
        start, stride = operands.key_coordinates[:, :1], operands.key_coordinates[:, 1:]
        key = start + stride * key
    return row_positions(operands), key


def call_extras(operands: Operands, spec: AttentionSpec) -> Extras:
    """The features of a prepared call."""
    position, coordinate = _coordinates(operands)
    wide = statistics_dtype(operands.query.dtype)
    terms = []
    if operands.slopes is not None:  # S9
        distance = jnp.abs(position[:, None, :, None] - coordinate[:, None, None])
        terms.append(-operands.slopes[:, :, None, None].astype(wide) * distance.astype(wide))
    if operands.bias is not None:
        terms.append(operands.bias.astype(wide))
    keep = None
    if operands.dropout is not None:  # S12
        keep = _dropout.keep_mask(operands.dropout, position, coordinate, spec.keep_threshold)
    return Extras(
        spec.softcap,
        sum(terms[1:], terms[0]) if terms else None,
        keep,
        _dropout.kept_scale(spec.keep_threshold),
        operands.sinks,
    )


def reference_attention(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and log-sum-exp [b, hq, sq] of a prepared call."""
    out, lse, _ = masked_attention(
        operands.query,
        operands.key,
        operands.value,
        visible_keys(operands, spec)[:, None],
        spec.scale,
        call_extras(operands, spec),
    )
    return out, lse
