"""Ways to write packed sequences, and the way from each to another.

  cu_seqlens    int32 [n + 1]: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
  segment ids   int32 [.., s]: one number per run of tokens, 0 for padding (docs/semantics.md S6)
  positions     int32 [.., s]: place of a token in its sequence
  lengths       int32 [b, s]:  "attention_mask_in_length" rows such as [2, 3, 0, 0, 0, 0]

All conversions are traceable and have static shapes; `pack` and `unpack` work on the host.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn import _values
from jax_flashattn._validate import check_int32

__all__ = [
    "Packing",
    "cu_seqlens_from_segment_ids",
    "pack",
    "positions_from_cu_seqlens",
    "positions_from_segment_ids",
    "segment_ids_from_attention_mask_in_length",
    "segment_ids_from_cu_seqlens",
    "segment_ids_from_positions",
    "unpack",
]


def check_cu_seqlens(cu_seqlens, total: int, name: str = "cu_seqlens") -> Array:
    """As an int32 [n + 1] array that starts anywhere, never decreases and stays within total."""
    shape = np.shape(cu_seqlens)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{name} must have shape [number of sequences + 1], got {shape}.")
    array = check_int32(cu_seqlens, name, shape)
    _values.check_cu_seqlens(cu_seqlens, total, name)
    return jax.lax.cummax(jnp.clip(array, 0, total))


def segment_ids_from_cu_seqlens(cu_seqlens: Array, total: int) -> Array:
    """Segment ids int32 [total]: sequence i has id i + 1, tokens behind the last one have 0.

    Args:
      cu_seqlens: int32 [n + 1]; equal neighbours are an empty sequence.
      total: number of tokens, a Python int.

    Raises:
      ValueError: for values that do not start at 0, decrease, or exceed total, if not traced.

    Example:
      >>> from jax_flashattn.packing import segment_ids_from_cu_seqlens
      >>> segment_ids_from_cu_seqlens([0, 2, 2, 5], 6).tolist()
      [1, 1, 3, 3, 3, 0]
    """
    cu_seqlens = check_cu_seqlens(cu_seqlens, total)
    token = jnp.arange(total, dtype=jnp.int32)
    ids = jnp.searchsorted(cu_seqlens, token, side="right").astype(jnp.int32)
    return jnp.where(token < cu_seqlens[-1], ids, 0)


def positions_from_cu_seqlens(cu_seqlens: Array, total: int) -> Array:
    """Positions int32 [total] of tokens in their sequences; 0 behind the last one.

    Args:
      cu_seqlens: int32 [n + 1].
      total: number of tokens, a Python int.

    Raises:
      ValueError: as segment_ids_from_cu_seqlens.

    Example:
      >>> from jax_flashattn.packing import positions_from_cu_seqlens
      >>> positions_from_cu_seqlens([0, 2, 2, 5], 6).tolist()
      [0, 1, 0, 1, 2, 0]
    """
    return positions_from_segment_ids(segment_ids_from_cu_seqlens(cu_seqlens, total))


def cu_seqlens_from_segment_ids(segment_ids: Array, max_segments: int | None = None) -> Array:
    """Cumulative lengths int32 [max_segments + 1] of one row of segment ids.

    Behind the last segment the array repeats its end: empty sequences.

    Args:
      segment_ids: int32 [s]; padding (0) only at the end, where cu_seqlens can express it.
      max_segments: how many segments there is room for, a Python int; default s.

    Raises:
      ValueError: for padding before a segment or more than max_segments segments, if not traced.

    Example:
      >>> from jax_flashattn.packing import cu_seqlens_from_segment_ids
      >>> cu_seqlens_from_segment_ids([7, 7, 3, 3, 3, 0], max_segments=3).tolist()
      [0, 2, 5, 5]
    """
    given = segment_ids
    segment_ids = check_int32(segment_ids, "segment_ids", np.shape(segment_ids))
    if segment_ids.ndim != 1:
        raise ValueError(f"segment_ids must be one row [s], got shape {segment_ids.shape}.")
    room = segment_ids.size if max_segments is None else max_segments

    def checker(ids):
        real = ids != 0
        if np.any(real[1:] & ~real[:-1]):
            raise ValueError("segment_ids has padding (0) before a segment; cu_seqlens cannot.")
        runs = np.count_nonzero(real & np.asarray(_begins(ids)))
        if runs > room:
            raise ValueError(f"segment_ids has {runs} segments, max_segments is {room}.")

    _values.check(checker, given)
    real = segment_ids != 0
    begins = real & _begins(segment_ids)
    run = jnp.where(real, jnp.cumsum(begins) - 1, room)
    lengths = jnp.zeros(room, jnp.int32).at[run].add(1, mode="drop")
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])


def _begins(ids) -> Array:
    """Whether a run of equal ids begins here, along the last axis."""
    before = jnp.roll(ids, 1, axis=-1)
    return (ids != before) | (jnp.arange(ids.shape[-1]) == 0)


def positions_from_segment_ids(segment_ids: Array) -> Array:
    """Positions int32 [.., s] of tokens in their segments (maximal runs of one id); 0 in padding.

    Args:
      segment_ids: int32 [.., s].

    Example:
      >>> from jax_flashattn.packing import positions_from_segment_ids
      >>> positions_from_segment_ids([[5, 5, 2, 2, 2, 0]]).tolist()
      [[0, 1, 0, 1, 2, 0]]
    """
    ids = check_int32(segment_ids, "segment_ids", np.shape(segment_ids))
    at = jnp.arange(ids.shape[-1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(_begins(ids), at, 0), axis=ids.ndim - 1)
    return jnp.where(ids != 0, at - start, 0)


def segment_ids_from_positions(positions: Array, real: Array | None = None) -> Array:
    """Segment ids int32 [.., s], numbered from 1: a segment begins wherever a position is 0.

    Args:
      positions: int32 [.., s].
      real: bool [.., s], False for padding, which positions alone cannot tell; default all True.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn.packing import segment_ids_from_positions
      >>> positions = jnp.array([0, 1, 0, 1, 2, 0])
      >>> segment_ids_from_positions(positions, real=jnp.arange(6) < 5).tolist()
      [1, 1, 2, 2, 2, 0]
    """
    positions = check_int32(positions, "positions", np.shape(positions))
    begins = positions == 0
    if real is not None:
        real = jnp.asarray(real)
        if real.dtype != jnp.bool_ or real.shape != positions.shape:
            raise ValueError(
                f"real must be bool of the shape of positions {positions.shape}, got "
                f"{real.dtype} {real.shape}."
            )
        begins &= real
    ids = jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
    return ids if real is None else jnp.where(real, ids, 0)


def segment_ids_from_attention_mask_in_length(attention_mask_in_length: Array) -> Array:
    """Segment ids int32 [b, s] of rows that list the lengths of their sequences.

    Args:
      attention_mask_in_length: int32 [b, s], a nonzero entry is the length of a sequence; the
        sequences of a row follow each other from its start.

    Raises:
      ValueError: for a negative length or a row longer than s, if not traced.

    Source: flash-attn's unpad_input_for_concatenated_sequences.

    Example:
      >>> from jax_flashattn.packing import segment_ids_from_attention_mask_in_length
      >>> segment_ids_from_attention_mask_in_length([[2, 3, 0, 0, 0, 0]]).tolist()
      [[1, 1, 2, 2, 2, 0]]
    """
    lengths = check_attention_mask_in_length(attention_mask_in_length)
    s = lengths.shape[1]
    token = jnp.arange(s, dtype=jnp.int32)

    def one(row):
        number = jnp.cumsum(row > 0, dtype=jnp.int32)
        ends = jnp.cumsum(row, dtype=jnp.int32)
        at = jnp.searchsorted(ends, token, side="right")
        return jnp.where(token < ends[-1], number[jnp.minimum(at, s - 1)], 0)

    return jax.vmap(one)(lengths) if s else lengths


def check_attention_mask_in_length(lengths) -> Array:
    """As int32 [b, s] with lengths of 0 or more whose sum fits the row."""
    shape = np.shape(lengths)
    name = "attention_mask_in_length"
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape [b, s], got {shape}.")
    array = check_int32(lengths, name, shape)

    def checker(values):
        if values.size and values.min() < 0:
            raise ValueError(f"{name} must not be negative, got {values.min()}.")
        longest = values.sum(1).max(initial=0)
        if longest > shape[1]:
            raise ValueError(f"{name} has a row of {longest} tokens, s is {shape[1]}.")

    _values.check(checker, lengths)
    return jnp.clip(array, 0, shape[1])


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where `pack` put each sequence; numpy arrays.

    Attributes:
      segment_ids: int32 [rows, row_length], 1, 2, ... within a row, 0 for padding.
      positions: int32 [rows, row_length], place within the sequence, 0 for padding.
      rows: int32 [n], row of each sequence.
      starts: int32 [n], its first column.
      lengths: int32 [n], its length.
    """

    segment_ids: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def pack(sequences: Sequence[np.ndarray], row_length: int, *, fill=0) -> tuple[np.ndarray, Packing]:
    """Packs sequences into as few rows as first fit gives, in the order given; on the host.

    Args:
      sequences: arrays [length, ...] of one dtype and one trailing shape.
      row_length: tokens of a row.
      fill: what padding holds.

    Returns:
      packed [rows, row_length, ...], and the Packing that says where everything is.

    Raises:
      ValueError: for no sequences, or one longer than row_length.

    Example:
      >>> import numpy as np
      >>> from jax_flashattn.packing import pack, unpack
      >>> rows, packing = pack([np.arange(3), np.arange(4), np.arange(2)], row_length=5)
      >>> rows.tolist()
      [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
      >>> packing.segment_ids.tolist()
      [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
      >>> [x.tolist() for x in unpack(rows, packing)]
      [[0, 1, 2], [0, 1, 2, 3], [0, 1]]
    """
    arrays = [np.asarray(x) for x in sequences]
    if not arrays:
        raise ValueError("sequences is empty; pack needs one to know dtype and shape.")
    lengths = np.array([len(x) for x in arrays], np.int32)
    if lengths.max() > row_length:
        raise ValueError(
            f"sequence {lengths.argmax()} has {lengths.max()} tokens, row_length is {row_length}."
        )
    rows, starts, used = np.zeros_like(lengths), np.zeros_like(lengths), []
    for n, length in enumerate(lengths):
        row = next((r for r, u in enumerate(used) if u + length <= row_length), len(used))
        if row == len(used):
            used.append(0)
        rows[n], starts[n] = row, used[row]
        used[row] += length

    shape = (len(used), row_length)
    packed = np.full((*shape, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    count = np.zeros(len(used), np.int32)
    for x, row, start, length in zip(arrays, rows, starts, lengths):
        span = slice(start, start + length)
        count[row] += length > 0
        packed[row, span], ids[row, span] = x, count[row]
        positions[row, span] = np.arange(length)
    return packed, Packing(ids, positions, rows, starts, lengths)


def unpack(packed: np.ndarray | Array, packing: Packing) -> list:
    """The sequences of `pack` in their order, from an array [rows, row_length, ...].

    Args:
      packed: what was packed, or anything a model made of it token by token.
      packing: from pack.
    """
    spans = zip(packing.rows, packing.starts, packing.lengths)
    return [packed[row, start : start + length] for row, start, length in spans]
