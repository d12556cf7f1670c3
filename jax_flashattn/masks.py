"""IntervalMask: a mask that says, for every query row, which run of keys it sees."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _mask, _mask_plot
from jax_flashattn._checks import as_array, check_int32, check_size, check_window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntervalMask:
    """Row i sees the keys lo[i] <= j < hi[i].

    Every mask of flash attention has this form: causal, windows, padding, packed documents,
    prefixes, chunks. It is a pytree of two small arrays, may be traced, and costs O(S) to make.
    Values outside the keys are clamped; lo >= hi is a row that sees nothing (its output is 0).

    Args:
      lo: int32 [b, sq], or [1, sq] for every batch element.
      hi: int32, the shape of lo.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import IntervalMask
      >>> mask = IntervalMask(jnp.array([[0, 0, 2]]), jnp.array([[2, 2, 3]]))
      >>> mask.materialize(3)[0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    lo: Array
    hi: Array

    @staticmethod
    def causal(sq: int, sk: int | None = None) -> "IntervalMask":
        """Row i sees keys up to i + sk - sq: the last query sees the last key (S1).

        Args:
          sq: number of query rows.
          sk: number of keys, sq unless given.

        Returns:
          a mask [1, sq].

        Example:
          >>> IntervalMask.causal(2, 3).materialize(3)[0].astype(int).tolist()
          [[1, 1, 0], [1, 1, 1]]
        """
        return IntervalMask.sliding_window(sq, sk, None, 0)

    @staticmethod
    def sliding_window(
        sq: int, sk: int | None, left: int | Array | None, right: int | Array | None
    ) -> "IntervalMask":
        """Row i sees keys i + sk - sq - left to i + sk - sq + right (S2).

        Args:
          sq: number of query rows.
          sk: number of keys, None for sq.
          left: how many keys before its aligned key a row sees, None for all. Unlike the `window`
            of flash_attention it may be a traced int32 scalar: layers of a `scan` can differ in
            their window.
          right: the same for keys after its aligned key; 0 is causal.

        Returns:
          a mask [1, sq].

        Example:
          >>> IntervalMask.sliding_window(3, 3, 1, 0).materialize(3)[0].astype(int).tolist()
          [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        sq, sk = _sizes(sq, sk)
        if not isinstance(left, jax.Array) and not isinstance(right, jax.Array):
            left, right = _mask.normalized_window(*check_window((left, right)), sq, sk)
        else:
            left, right = _bound("left", left, sk), _bound("right", right, sq)
        return IntervalMask(*_mask.arithmetic_intervals(sq, sk, left, right))

    @staticmethod
    def documents(
        query_ids: Array,
        key_ids: Array | None = None,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
    ) -> "IntervalMask":
        """Packed documents: rows see the keys of their own document only (S6).

        Args:
          query_ids: int32 [b, sq]; a document is a maximal run of equal ids, id 0 is padding.
          key_ids: int32 [b, sk]; the n-th run of an id among the queries meets the n-th run of
            that id among the keys. None for self-attention.
          causal: row i sees keys up to its own, counted from the end of the document.
          window: (left, right) within the document, as in flash_attention.

        Returns:
          a mask [b, sq].

        Example:
          >>> ids = jnp.array([[7, 7, 8, 0]])
          >>> IntervalMask.documents(ids, causal=True).materialize(4)[0].astype(int).tolist()
          [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
        """
        shape = _rank("query_ids", query_ids, 2)
        query_ids = check_int32(query_ids, "query_ids", shape)
        if key_ids is not None:
            key_shape = (shape[0], _rank("key_ids", key_ids, 2)[1])
            key_ids = check_int32(key_ids, "key_ids", key_shape)
        left, right = _sides(causal, window)
        rows = _mask.segment_rows(query_ids, key_ids)
        return IntervalMask(*_mask.segment_intervals(rows, left, right))

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens_q: Array,
        cu_seqlens_k: Array | None = None,
        *,
        total_q: int,
        total_k: int | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
    ) -> "IntervalMask":
        """Packed sequences by their cumulative lengths, as flash-attn's varlen functions take them.

        Sequence n has the query rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1 of one long row.
        What lies before the first or behind the last sequence is padding.

        Args:
          cu_seqlens_q: int32 [n + 1], not decreasing.
          cu_seqlens_k: int32 [n + 1]; None for self-attention.
          total_q: number of query rows, packed and padding.
          total_k: number of keys; total_q unless cu_seqlens_k is given.
          causal: aligned at the end of every sequence.
          window: (left, right) within the sequence, as in flash_attention.

        Returns:
          a mask [1, total_q].

        Example:
          >>> cu = jnp.array([0, 2, 3])
          >>> mask = IntervalMask.from_cu_seqlens(cu, total_q=4)
          >>> mask.materialize(4)[0].astype(int).tolist()
          [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
        """
        if (cu_seqlens_k is None) != (total_k is None):
            raise ValueError(
                "cu_seqlens_k and total_k must be given together, got "
                f"cu_seqlens_k={cu_seqlens_k!r} and total_k={total_k!r}."
            )
        query_ids = _ids_of(cu_seqlens_q, "cu_seqlens_q", check_size("total_q", total_q))
        if cu_seqlens_k is None:
            return IntervalMask.documents(query_ids, causal=causal, window=window)
        if jnp.shape(cu_seqlens_k) != jnp.shape(cu_seqlens_q):
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have one shape [sequences + 1], got "
                f"{jnp.shape(cu_seqlens_q)} and {jnp.shape(cu_seqlens_k)}."
            )
        key_ids = _ids_of(cu_seqlens_k, "cu_seqlens_k", check_size("total_k", total_k))
        return IntervalMask.documents(query_ids, key_ids, causal=causal, window=window)

    @staticmethod
    def prefix(prefix_lengths: Array, sq: int, sk: int | None = None) -> "IntervalMask":
        """Prefix-LM: every row sees the first keys, and the others causally.

        Args:
          prefix_lengths: int32 [b], how many leading keys all rows see.
          sq: number of query rows.
          sk: number of keys, sq unless given.

        Returns:
          a mask [b, sq].

        Example:
          >>> IntervalMask.prefix(jnp.array([2]), 3).materialize(3)[0].astype(int).tolist()
          [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
        """
        sq, sk = _sizes(sq, sk)
        shape = _rank("prefix_lengths", prefix_lengths, 1)
        length = check_int32(prefix_lengths, "prefix_lengths", shape)[:, None]
        causal = IntervalMask.causal(sq, sk)
        hi = jnp.maximum(causal.hi, jnp.clip(length, 0, sk))
        return IntervalMask(jnp.broadcast_to(causal.lo, hi.shape), hi)

    @staticmethod
    def chunked(
        sq: int, chunk: int, sk: int | None = None, *, causal: bool = True
    ) -> "IntervalMask":
        """Chunked local attention (Llama 4): keys are cut into chunks, rows see their own only.

        Args:
          sq: number of query rows; row i belongs to the chunk of its aligned key i + sk - sq.
          chunk: keys of a chunk; the first starts at key 0.
          sk: number of keys, sq unless given.
          causal: whether a row sees no key behind its aligned one.

        Returns:
          a mask [1, sq].

        Example:
          >>> IntervalMask.chunked(4, 2).materialize(4)[0].astype(int).tolist()
          [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        """
        sq, sk = _sizes(sq, sk)
        chunk = check_size("chunk", chunk, least=1)
        window = IntervalMask.sliding_window(sq, sk, None, 0 if causal else None)
        aligned = jnp.arange(sk - sq, sk, dtype=jnp.int32)[None]
        begin = aligned // chunk * chunk
        return window & IntervalMask(jnp.clip(begin, 0, sk), jnp.clip(begin + chunk, 0, sk))

    def __and__(self, other: "IntervalMask") -> "IntervalMask":
        """The keys visible in both masks; intervals are closed under intersection."""
        return IntervalMask(*_mask.intersect((self.lo, self.hi), (other.lo, other.hi)))

    def for_keys(self, start: int | Array, count: int, stride: int | Array = 1) -> "IntervalMask":
        """This mask over a part of the keys: start, start + stride, ..., `count` of them.

        What a device of context parallelism, or a loop over chunks, sees of the whole mask: clip
        and divide. `start` and `stride` may be traced, so the same program serves every part.

        Args:
          start: the first key of the part; int or int32 scalar.
          count: number of keys in the part.
          stride: distance between its keys, 1 or more; int or int32 scalar.

        Returns:
          a mask of the same shape, whose keys are those of the part, numbered from 0.

        Example:
          >>> IntervalMask.causal(4).for_keys(1, 2, stride=2).materialize(2)[0].astype(int).tolist()
          [[0, 0], [1, 0], [1, 0], [1, 1]]
        """
        return IntervalMask(*_mask.affine_part((self.lo, self.hi), start, count, stride))

    def for_positions(self, positions: Array) -> "IntervalMask":
        """This mask over any part of the keys, given where they are.

        An increasing part of an interval is an interval, so this is exact for every layout of
        context parallelism whose shards keep the order of their tokens, zigzag included.

        Args:
          positions: int32 [count], increasing: which keys the part has.

        Returns:
          a mask of the same shape, whose keys are those of the part, numbered from 0.

        Example:
          >>> part = IntervalMask.causal(4).for_positions(jnp.array([0, 3]))
          >>> part.materialize(2)[0].astype(int).tolist()
          [[1, 0], [1, 0], [1, 0], [1, 1]]
        """
        positions = check_int32(positions, "positions", _rank("positions", positions, 1))
        return IntervalMask(*(_mask.count_below(positions, x) for x in (self.lo, self.hi)))

    def materialize(self, sk: int) -> Array:
        """The boolean matrix [b, sq, sk], for people and tests; costs O(sq sk)."""
        return _mask.visible(self.lo, self.hi, sk)

    def plot(
        self,
        sk: int,
        *,
        batch: Sequence[int] = (0,),
        tile: tuple[int, int] = (128, 128),
        axes: Any = None,
    ) -> Any:  # matplotlib.figure.Figure
        """Draws who sees whom, over the tiles a kernel would skip, run unmasked, or mask (S5).

        Args:
          sk: number of keys.
          batch: the batch elements to draw, one panel each.
          tile: (rows, keys) of a tile.
          axes: matplotlib axes to draw in, one per panel; a new figure unless given.

        Returns:
          the matplotlib figure; show it in a notebook or call its savefig.

        Raises:
          ImportError: matplotlib is missing; it comes with `pip install 'jax_flashattn[plot]'`.
        """
        return _mask_plot.draw((self.lo, self.hi), sk, batch, tile, axes)


def _sizes(sq: int, sk: int | None) -> tuple[int, int]:
    sq = check_size("sq", sq)
    return sq, sq if sk is None else check_size("sk", sk)


def _bound(name: str, side: Any, most: int) -> Any:
    """A window side as an int32 scalar that may be traced; `most` hides nothing (S3)."""
    if isinstance(side, jax.Array):
        return jnp.clip(check_int32(side, name, ()), 0, most)
    return None if side is None else min(check_size(name, side), most)


def _sides(causal: bool, window: Any) -> tuple[int | None, int | None]:
    left, right = check_window(window)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}.")
    return left, 0 if causal else right  # S2: no side is below 0


def _rank(name: str, x: Any, rank: int) -> tuple[int, ...]:
    shape = as_array(x, name).shape
    if len(shape) != rank:
        raise ValueError(f"{name} must have {rank} dimension{'s'[: rank > 1]}, got shape {shape}.")
    return shape


def _ids_of(cu_seqlens: Array, name: str, total: int) -> Array:
    """Document ids [1, total]: 1, 2, ... and 0 for what no sequence holds."""
    shape = _rank(name, cu_seqlens, 1)
    cu_seqlens = check_int32(cu_seqlens, name, shape)
    if shape[0] < 2:
        raise ValueError(f"{name} must have at least 2 numbers, got shape {shape}.")
    row = jnp.arange(total, dtype=jnp.int32)
    ids = jnp.searchsorted(cu_seqlens, row, side="right").astype(jnp.int32)
    return jnp.where(row < cu_seqlens[-1], ids, 0)[None]
