"""Which keys a query row sees (docs/semantics.md S2, S3, S6), as row intervals [lo, hi).

This module and csrc/semantics/mask.h are the only places where the rule is written; a test holds
both against a brute force. Everything here costs O(S).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Intervals = tuple[Array, Array]
SKIP, PARTIAL, FULL = range(3)  # tile classes (S5)


def normalized_window(
    left: int | None, right: int | None, sq: int, sk: int
) -> tuple[int | None, int | None]:
    """S3: drops a window side that can hide nothing."""
    left = None if left is not None and left >= sk - 1 else left
    right = None if right is not None and right >= sq - 1 else right
    return left, right


def arithmetic_intervals(
    sq: int,
    sk: int,
    left: int | Array | None,
    right: int | Array | None,
    lengths: Array | None = None,
) -> Intervals:
    """S2: intervals [b or 1, sq] of a window over sequences of the given lengths.

    Args:
      sq: number of query rows.
      sk: number of keys.
      left: bound on earlier keys, or None; may be a traced scalar of at most sk.
      right: bound on later keys, or None; may be a traced scalar of at most sq.
      lengths: int32 [b, 2], the true (query, key) length of each sequence; None for (sq, sk).
    """
    row = jnp.arange(sq, dtype=jnp.int32)[None]
    if lengths is None:
        query_length, key_length = (jnp.full((1, 1), n, jnp.int32) for n in (sq, sk))
    else:
        query_length, key_length = jnp.clip(lengths[:, :1], 0, sq), jnp.clip(lengths[:, 1:], 0, sk)
    centre = row + key_length - query_length
    lo = jnp.zeros_like(centre) if left is None else jnp.clip(centre - left, 0, key_length)
    hi = jnp.broadcast_to(key_length, centre.shape)
    if right is not None:
        hi = jnp.clip(centre + right + 1, 0, key_length)
    real = row < query_length
    return jnp.where(real, lo, 0).astype(jnp.int32), jnp.where(real, hi, 0).astype(jnp.int32)


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """The keys visible in both."""
    return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])


def affine_part(
    limits: Intervals, start: int | Array, count: int, stride: int | Array
) -> Intervals:
    """The intervals over the keys start + stride * j, 0 <= j < count, numbered by j."""
    end = start + stride * count  # clipped first: any int32 limit is welcome
    lo, hi = (-((start - jnp.clip(x, start, end)) // stride) for x in limits)
    return lo, hi


def count_below(positions: Array, limits: Array) -> Array:
    """How many of the increasing positions lie below each limit."""
    return jnp.searchsorted(positions, limits).astype(jnp.int32)


def tile_classes(limits: Intervals, sk: int, rows: int, keys: int) -> Array:
    """S5: int8 [b, row tiles, key tiles] of SKIP, PARTIAL and FULL."""
    lo, hi = limits
    b, sq = lo.shape
    lo, hi = jnp.clip(lo, 0, sk), jnp.clip(hi, 0, sk)
    behind = ((0, 0), (0, -sq % rows))

    def tiles(reduce, x, when_empty, padding):
        x = jnp.pad(jnp.where(lo < hi, x, when_empty), behind, constant_values=padding)
        return reduce(x.reshape(b, -1, rows), axis=2)[..., None]

    # The union over rows that see anything; the intersection over all rows, empty if one sees none.
    min_lo, max_hi = tiles(jnp.min, lo, sk, sk), tiles(jnp.max, hi, 0, 0)
    max_lo, min_hi = tiles(jnp.max, lo, 0, 0), tiles(jnp.min, hi, 0, sk)
    begin = jnp.arange(0, sk, keys, dtype=jnp.int32)
    end = jnp.minimum(begin + keys, sk)
    skip = (end <= min_lo) | (begin >= max_hi)
    full = (max_lo <= begin) & (end <= min_hi)
    return jnp.where(skip, SKIP, jnp.where(full, FULL, PARTIAL)).astype(jnp.int8)


def _runs(ids: Array) -> tuple[Array, Array]:
    """Start and end of the maximal run of equal ids around each position; ids is [s]."""
    s = ids.shape[0]
    at = jnp.arange(s, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones(min(s, 1), bool), ids[1:] != ids[:-1]])
    start = jax.lax.cummax(jnp.where(begins, at, 0))
    ends = jnp.concatenate([begins[1:], jnp.ones(min(s, 1), bool)])
    end = jax.lax.cummin(jnp.where(ends, at + 1, s), reverse=True)
    return start, end


def _run_table(ids: Array, start: Array) -> tuple[Array, Array, Array]:
    """Positions with run starts first, by id and then by position; their ids; number of runs."""
    begins = start == jnp.arange(ids.shape[0], dtype=jnp.int32)
    order = jnp.lexsort((ids, ~begins)).astype(jnp.int32)
    sorted_ids = jnp.where(begins[order], ids[order], jnp.iinfo(jnp.int32).max)
    return order, sorted_ids, begins.sum(dtype=jnp.int32)


def _matching_runs(query_ids: Array, key_ids: Array) -> tuple[Array, Array, Array, Array]:
    """For each query: its run's start and end, and those of the key run it attends to.

    The n-th run of an id among the queries meets the n-th run of that id among the keys; a query
    whose run has no partner gets an empty key run.
    """
    q_start, q_end = _runs(query_ids)
    k_start, k_end = _runs(key_ids)
    q_order, q_sorted, _ = _run_table(query_ids, q_start)
    k_order, k_sorted, k_runs = _run_table(key_ids, k_start)
    q_rank = jnp.zeros_like(q_order).at[q_order].set(jnp.arange(q_order.size, dtype=jnp.int32))
    first_of_id = jnp.searchsorted(q_sorted, query_ids)
    occurrence = q_rank[q_start] - first_of_id
    wanted = jnp.searchsorted(k_sorted, query_ids) + occurrence
    at = jnp.clip(wanted, 0, key_ids.size - 1)
    found = (wanted < k_runs) & (k_sorted[at] == query_ids)
    partner = k_order[at]
    begin = jnp.where(found, k_start[partner], 0)
    return q_start, q_end, begin, jnp.where(found, k_end[partner], 0)


class SegmentRows(NamedTuple):
    """Of each row [b, sq]: its aligned key, the key run it meets, and whether it is real."""

    centre: Array
    begin: Array
    end: Array
    real: Array


def segment_rows(query_ids: Array, key_ids: Array | None) -> SegmentRows:
    """S6: where each row of packed segments stands among the keys.

    Args:
      query_ids: int32 [b, sq]; a segment is a maximal run of equal ids, 0 is padding.
      key_ids: int32 [b, sk], or None for self-attention (the query's ids).
    """
    row = jnp.arange(query_ids.shape[1], dtype=jnp.int32)

    def one(q_ids: Array, k_ids: Array | None) -> SegmentRows:
        if k_ids is None:
            q_start, q_end = _runs(q_ids)
            begin, end = q_start, q_end
        elif q_ids.size == 0 or k_ids.size == 0:
            nothing = jnp.zeros_like(q_ids)
            return SegmentRows(nothing, nothing, nothing, nothing != 0)
        else:
            _, q_end, begin, end = _matching_runs(q_ids, k_ids)
        return SegmentRows(end - (q_end - row), begin, end, q_ids != 0)

    if key_ids is None:
        return jax.vmap(lambda q_ids: one(q_ids, None))(query_ids)
    return jax.vmap(one)(query_ids, key_ids)


def segment_intervals(rows: SegmentRows, left: int | None, right: int | None) -> Intervals:
    """S6: intervals [b, sq] of packed segments, each with its own bottom-right aligned window.

    Args:
      rows: of segment_rows.
      left: bound on earlier keys within the segment, or None.
      right: bound on later keys within the segment, or None.
    """
    centre, begin, end, real = rows
    lo = begin if left is None else jnp.clip(centre - left, begin, end)
    hi = end if right is None else jnp.clip(centre + right + 1, begin, end)
    return jnp.where(real, lo, 0), jnp.where(real, hi, 0)


def arithmetic_positions(sq: int, sk: int, lengths: Array | None = None) -> Array:
    """S2: the aligned key coordinate [b or 1, sq] of each row, of ALiBi and dropout."""
    row = jnp.arange(sq, dtype=jnp.int32)[None]
    if lengths is None:
        return row + (sk - sq)
    return row + jnp.clip(lengths[:, 1:], 0, sk) - jnp.clip(lengths[:, :1], 0, sq)


def visible(lo: Array, hi: Array, sk: int) -> Array:
    """The boolean matrix [..., sq, sk] of intervals [..., sq]: for the reference and for people."""
    key = jnp.arange(sk, dtype=jnp.int32)
    return (lo[..., None] <= key) & (key < hi[..., None])
