"""Masks as jax.nn and Flax write them: aligned top-left, and boolean matrices."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _mask
from jax_flashattn._reference import masked_attention
from jax_flashattn.api import flash_attention
from jax_flashattn.masks import IntervalMask


def top_left(sq: int, sk: int, left: int | None, right: int | None) -> IntervalMask:
    """Row i sees the keys i - left to i + right; None is unbounded. [1, sq]."""
    row = jnp.arange(sq, dtype=jnp.int32)[None]
    lo = jnp.zeros_like(row) if left is None else jnp.clip(row - left, 0, sk)
    hi = jnp.full_like(row, sk) if right is None else jnp.clip(row + right + 1, 0, sk)
    return IntervalMask(lo, hi)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    limits: IntervalMask | None = None,
    *,
    scale: float | None = None,
    implementation: Literal["kernel", "reference"] | None = None,
) -> tuple[Array, Array]:
    """Output and log-sum-exp under a boolean mask, by the kernel if it has the form of intervals.

    That is checked as the program runs. A mask that depends on neither head nor row costs O(sk);
    a mask with a dimension sq costs O(sq sk) to read, and any mask that is not an interval per row,
    the same for every head, takes plain XLA attention.

    Args:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv].
      mask: bool [b or 1, hq or 1, sq or 1, sk or 1], True where visible.
      limits: what else hides keys.
      scale: factor on the scores, default 1/sqrt(d).
      implementation: of interval masks, as in flash_attention.
    """
    b, sq, sk = query.shape[0], query.shape[1], key.shape[1]
    mask = jnp.broadcast_to(mask, (*mask.shape[:3], sk))
    first = mask[:, 0]
    lo = jnp.argmax(first, axis=-1).astype(jnp.int32)
    hi = lo + first.sum(-1, dtype=jnp.int32)
    is_interval = (_mask.visible(lo, hi, sk)[:, None] == mask).all()

    def kernel(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        rows = IntervalMask(*(jnp.broadcast_to(x, (b, sq)) for x in (lo, hi)))
        rows = rows if limits is None else rows & limits
        options: Any = {"scale": scale, "implementation": implementation, "return_lse": True}
        return flash_attention(query, key, value, mask=rows, **options)

    @jax.checkpoint  # or its sq x sk residuals would exist even where the kernel runs
    def plain(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        visible = jnp.broadcast_to(mask, (*mask.shape[:2], sq, sk))
        if limits is not None:
            visible = visible & limits.materialize(sk)[:, None]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return masked_attention(query, key, value, visible, factor)[:2]

    return jax.lax.cond(is_interval, kernel, plain, query, key, value)
