"""Rotary position embedding (Su et al. 2021), both conventions, also of a part of the head."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn import _values, packing
from jax_flashattn._operands import statistics_dtype
from jax_flashattn._validate import check_int32

__all__ = ["apply_rotary_emb"]


def apply_rotary_emb(
    x: Array,
    cos: Array,
    sin: Array,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Array = 0,
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
) -> Array:
    """Rotates the leading rotary_dim numbers of each head, by flash-attn's name and arguments.

    Args:
      x: [b, s, h, d], or [total, h, d] with cu_seqlens.
      cos: [rows, rotary_dim / 2], row p for position p.
      sin: as cos.
      interleaved: pairs are numbers (0, 1), (2, 3), ... (GPT-J); else (0, rotary_dim / 2),
        (1, rotary_dim / 2 + 1), ... (GPT-NeoX).
      inplace: must be False; arrays do not change here.
      seqlen_offsets: position of the first token of each sequence, an int or int32 [b].
      cu_seqlens: int32 [b + 1], for sequences one after the other.
      max_seqlen: has no effect; cu_seqlens say everything.

    Returns:
      the shape and dtype of x; the rotation is computed in float32 (float64 for float64).

    Raises:
      ValueError: for a wrong shape, or positions without a row in cos, if not traced (then the
        nearest row is taken).

    Source: flash-attn 2.8, layers/rotary.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import apply_rotary_emb
      >>> angle = jnp.arange(32.0)[:, None] * 10_000.0 ** (-jnp.arange(8) / 8)
      >>> apply_rotary_emb(jnp.ones((2, 5, 4, 64)), jnp.cos(angle), jnp.sin(angle)).shape
      (2, 5, 4, 64)
    """
    del max_seqlen
    if inplace:
        raise ValueError("inplace must be False: use the array that is returned.")
    x, cos, sin = jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin)
    if x.ndim != (4 if cu_seqlens is None else 3):
        what = "[b, s, h, d]" if cu_seqlens is None else "[total, h, d] with cu_seqlens"
        raise ValueError(f"x must have shape {what}, got {x.shape}.")
    if cu_seqlens is None:
        offsets = _offsets(seqlen_offsets, x.shape[0])
        positions = offsets[:, None] + np.arange(x.shape[1], dtype=np.int32)
    else:
        offsets = _offsets(seqlen_offsets, np.shape(cu_seqlens)[0] - 1)
        ids = packing.segment_ids_from_cu_seqlens(cu_seqlens, x.shape[0])
        places = packing.positions_from_cu_seqlens(cu_seqlens, x.shape[0])
        positions = jnp.where(ids > 0, places + jnp.asarray(offsets)[ids - 1], 0)
    check_tables(cos, sin, x.shape[-1])
    _values.check_range(positions, 0, cos.shape[0] - 1, "rotary positions")
    return rotate(x, cos, sin, jnp.asarray(positions), interleaved)


def _offsets(offsets: Any, b: int) -> np.ndarray | Array:
    """int32 [b]; a known value stays a numpy array."""
    if np.ndim(offsets) == 0 and _values.known(offsets):
        return np.full(b, offsets, np.int32)
    if np.ndim(offsets) == 0:
        return jnp.broadcast_to(jnp.asarray(offsets, jnp.int32), (b,))
    array = check_int32(offsets, "seqlen_offsets", (b,))
    return np.asarray(offsets, np.int32) if _values.known(offsets) else array


def check_tables(cos: Array, sin: Array, d: int) -> int:
    """rotary_dim of cos and sin [rows, rotary_dim / 2] for heads of d numbers."""
    if cos.ndim != 2 or cos.shape != sin.shape or 0 in cos.shape:
        raise ValueError(
            "rotary cos and sin must have one shape [rows, rotary_dim / 2], got "
            f"{cos.shape} and {sin.shape}."
        )
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim > d:
        raise ValueError(f"rotary_dim must be at most head_dim {d}, got {rotary_dim}.")
    return rotary_dim


def rotate(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> Array:
    """x [.., h, d] at int32 positions [..]; positions without a row take the nearest."""
    wide = statistics_dtype(x.dtype)
    cos, sin = (t.at[jnp.clip(positions, 0)].get(mode="clip")[..., None, :] for t in (cos, sin))
    cos, sin = cos.astype(wide), sin.astype(wide)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].astype(wide), x[..., 2 * half :]
    shape = (*turned.shape[:-1], half, 2) if interleaved else (*turned.shape[:-1], 2, half)
    axis = -1 if interleaved else -2
    first, second = jnp.moveaxis(turned.reshape(shape), axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
    turned = turned.reshape(*x.shape[:-1], 2 * half).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1)
