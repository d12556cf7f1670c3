"""Shifted sparse attention of LongLoRA, as one call over intervals."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn import packing
from jax_flashattn._torch_names import as_int
from jax_flashattn._validate import check_arrays, check_lengths, check_segment_ids
from jax_flashattn.api import flash_attention

__all__ = ["shifted_sparse_attention"]


def shifted_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    group_size: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: Literal["kernel", "reference"] | None = None,
) -> Any:
    """Attention within groups of tokens, shifted by half a group for half of the heads.

    The first half of the heads attends within tokens [0, g), [g, 2g), ...; the second half within
    [0, g/2), [g/2, 3g/2), ... Nothing wraps around and no row sees a later token. Groups are
    counted from the start of each document, so a packed or padded batch gives what its documents
    give one by one.

    The head halves have different masks, so they are folded into the batch: query, key, value and
    the output are copied once each, and the kernel runs once.

    Args:
      query: [b, s, hq, d], hq even.
      key: [b, s, hk, d]; hk divides hq. If hk is odd, each key head is copied once.
      value: [b, s, hk, dv].
      group_size: tokens of a group, even; the last group of a document may be shorter.
      causal: within a group a row sees tokens up to its own.
      scale: factor on the scores, default 1/sqrt(d).
      softcap: as in flash_attention.
      alibi_slopes: float32 [hq] or [b, hq], as in flash_attention.
      segment_ids: int32 [b, s], documents as in flash_attention; 0 is padding, on any side.
      lengths: int32 [b], how many leading tokens are real.
      dropout_rate: as in flash_attention.
      dropout_key: as in flash_attention.
      deterministic: as in flash_attention.
      return_lse: also return the log-sum-exp of each row's scores.
      implementation: as in flash_attention.

    Returns:
      [b, s, hq, dv]; with return_lse also float32 [b, hq, s].

    Raises:
      ValueError: for an odd group_size or odd hq, key shorter or longer than query, bad shapes.

    Source: Chen et al. 2023, LongLoRA (arXiv:2309.12307).

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import shifted_sparse_attention
      >>> q, k = jnp.ones((2, 64, 4, 16)), jnp.ones((2, 64, 2, 16))
      >>> shifted_sparse_attention(q, k, k, 16, lengths=jnp.array([64, 40])).shape
      (2, 64, 4, 16)
    """
    query, key, value = check_arrays(query, key, value)
    b, s, hq, _ = query.shape
    _check(group_size, s, key.shape[1], hq)
    ids = _group_ids(segment_ids, lengths, b, s, group_size)
    if key.shape[2] % 2:  # each half of the query heads needs key heads of its own
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    if alibi_slopes is not None:
        alibi_slopes = jnp.broadcast_to(alibi_slopes, (b, hq)).reshape(2 * b, hq // 2)
    out, lse = flash_attention(
        *map(_fold, (query, key, value)),
        causal=causal,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        segment_ids=ids.reshape(2 * b, s),
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
        return_lse=True,
        implementation=implementation,
    )
    out = out.reshape(b, 2, s, hq // 2, -1).swapaxes(1, 2).reshape(b, s, hq, -1)
    return (out, lse.reshape(b, hq, s)) if return_lse else out


def _check(group_size: Any, s: int, sk: int, hq: int) -> None:
    group_size = as_int(group_size, "group_size")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even and positive, got {group_size}.")
    if hq % 2:
        raise ValueError(f"the number of query heads must be even, got {hq}.")
    if s != sk:
        raise ValueError(f"query and key must have the same length, got {s} and {sk}.")


def _fold(x: Array) -> Array:
    """The halves of the heads as neighbours in the batch: [b, s, h, d] to [2b, s, h/2, d]."""
    b, s, h, d = x.shape
    return x.reshape(b, s, 2, h // 2, d).swapaxes(1, 2).reshape(2 * b, s, h // 2, d)


def _group_ids(segment_ids: Any, lengths: Any, b: int, s: int, group_size: int) -> Array:
    """Segment ids int32 [b, 2, s] of the groups, without and with the shift."""
    if segment_ids is None:
        position = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
        real = jnp.ones((b, s), bool)
    else:
        checked = check_segment_ids(segment_ids, b, s, s)
        if checked is None or checked[1] is not None:
            raise ValueError("segment_ids must be one array [b, s], got a pair.")
        position, real = packing.positions_from_segment_ids(checked[0]), checked[0] != 0
    pairs = check_lengths(lengths, b)
    if pairs is not None:
        real &= jnp.arange(s) < pairs[:, :1]
    shift = np.array([[0], [group_size // 2]], np.int32)
    position, real = position[:, None], real[:, None]
    begins = (position == 0) | ((position + shift) % group_size == 0)
    return jnp.where(real, jnp.cumsum(begins & real, axis=-1, dtype=jnp.int32), 0)
