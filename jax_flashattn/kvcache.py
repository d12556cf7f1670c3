"""Attention over a cache of keys and values, for decoding and for prefill in chunks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn import _pages, _torch_names, _validate, _values
from jax_flashattn._append import append, append_by_scatter
from jax_flashattn._attention import attention
from jax_flashattn._cached import MOST_PARTS, cached_attention, gathered, parts_of
from jax_flashattn._reference import reference_attention
from jax_flashattn._torch_names import as_int
from jax_flashattn._validate import check_int32
from jax_flashattn.masks import IntervalMask
from jax_flashattn.rotary import check_tables, rotate

__all__ = ["flash_attn_with_kvcache"]


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """Appends k, v to the cache and attends to it, by flash-attn's name and arguments.

    Arrays do not change in JAX, so the caches are results. Donate them to a jitted step (or carry
    them through lax.scan or while_loop) and they are updated in place, by a kernel of ours that
    writes the new rows only. On CPU a q of up to 64 rows attends by a kernel that reads the cache
    where it lies, paged or not (a contiguous cache: up to 16 rows of all query heads that share a
    key head; the general kernel takes more). On CUDA, and for a longer q, what is paged, indexed by
    cache_batch_idx, or of more rows than q is gathered first, and the general kernel attends.

    Args:
      q: [b, sq, hq, d]; sq is 1 to decode, more to prefill.
      k_cache: [cache_b, s, hk, d], or [num_blocks, block_size, hk, d] with block_table, where
        block_size is a multiple of 16.
      v_cache: as k_cache.
      k: [b, new, hk, d], written at cache_seqlens; the queries then see it.
      v: as k.
      rotary_cos: [rows, rotary_dim / 2], at least as many rows as the cache has positions. k is
        rotated at positions cache_seqlens, cache_seqlens + 1, ...; so is q with causal or a window,
        else all of q at cache_seqlens. Needs k.
      rotary_sin: as rotary_cos.
      cache_seqlens: an int or int32 [b], keys in the cache before the append; default a full cache.
      cache_batch_idx: int32 [b], row of the cache of each row of q; default 0, 1, ... Equal indices
        may write over each other.
      cache_leftpad: int32 [b], first real position of each row of the cache; default 0.
      block_table: int32 [b, blocks], blocks of each sequence.
      softmax_scale: factor on the scores, default 1/sqrt(d).
      causal: aligned bottom-right, to the end of the sequence with the new keys.
      window_size: (left, right), aligned like causal; -1 or None for unbounded.
      softcap: as in flash_attn_func.
      rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
      alibi_slopes: float32 [hq] or [b, hq].
      num_splits: 0 to 128, how many parts of the keys are worked on at once; 0 chooses by sizes.
        The general kernel has no parts.
      return_softmax_lse: also return the log-sum-exp.
      learnable_sink: [hq], a logit per head that joins the softmax's denominator.
      implementation: "kernel" (the default); "xla": append by XLA's scatter, gather what is paged
        or indexed, then the general kernel; "reference": likewise, then plain jax.numpy.

    Returns:
      out [b, sq, hq, d]; with k, v: (out, k_cache, v_cache); with return_softmax_lse a last
      element float32 [b, hq, sq].

    Raises:
      ValueError: for bad shapes, and, where values are not traced, for a cache too small for the
        append, indices and block ids out of range. Traced ones never write outside their row:
        keys that do not fit are dropped.

    Source: flash-attn 2.8, flash_attn_interface.py.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_with_kvcache
      >>> cache = jnp.zeros((2, 64, 2, 16))
      >>> q, new = jnp.ones((2, 1, 4, 16)), jnp.ones((2, 1, 2, 16))
      >>> step = jax.jit(flash_attn_with_kvcache, donate_argnums=(1, 2))
      >>> out, k_cache, v_cache = step(
      ...     q, cache, cache.copy(), new, new, cache_seqlens=jnp.array([5, 9]))
      >>> out.shape
      (2, 1, 4, 16)
    """
    write, attend = _way(implementation)
    options = _torch_names.native_options(
        dropout_p=0.0,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=False,
        dropout_key=None,
        learnable_sink=learnable_sink,
        implementation=None,
    )
    del options["implementation"]
    if not 0 <= as_int(num_splits, "num_splits") <= MOST_PARTS:
        raise ValueError(f"num_splits must be 0 to {MOST_PARTS}, got {num_splits}.")
    q, k_cache, v_cache = (jnp.asarray(x) for x in (q, k_cache, v_cache))
    new = _check_new(q, k_cache, v_cache, k, v)
    cache = _Cache(k_cache, q.shape[0], cache_batch_idx, cache_leftpad, block_table)
    lengths = cache.check_lengths(cache_seqlens, 0 if new is None else new[0].shape[1])
    q, new = _rotated(
        q, new, rotary_cos, rotary_sin, lengths, cache.capacity, rotary_interleaved, options
    )
    if new is not None:
        start = jnp.asarray(lengths)
        k_cache, v_cache = (
            write(x, n, start, cache.ids()) for x, n in zip((k_cache, v_cache), new)
        )
        lengths = lengths + new[0].shape[1]
    rows = jnp.full(q.shape[0], q.shape[1], jnp.int32)
    operands, spec = _validate.prepare(
        *(q, k_cache, v_cache),
        lengths=(rows, jnp.asarray(lengths)),
        mask=cache.leftpad_mask(q.shape[1]),
        segment_ids=None,
        capacity=cache.capacity,
        **options,
    )
    b, sq, hq, _ = q.shape
    parts = parts_of(b, sq, hq, cache.capacity, num_splits)
    out, lse = attend(operands, cache.ids(), spec, parts)
    results = (out,) if new is None else (out, k_cache, v_cache)
    results = (*results, lse) if return_softmax_lse else results
    return results if len(results) > 1 else out


def _gather(attention, operands, table, spec, parts):
    del parts
    return attention(gathered(operands, table), spec)


# Each implementation's append and attention, jitted as in api.py.
_jit = functools.partial(jax.jit, static_argnums=(2, 3))
_KERNEL = (append, _jit(cached_attention))
_WAYS: dict[str | None, tuple[Any, Any]] = {
    None: _KERNEL,
    "kernel": _KERNEL,
    "xla": (append_by_scatter, _jit(functools.partial(_gather, attention))),
    "reference": (append_by_scatter, _jit(functools.partial(_gather, reference_attention))),
}


def _way(implementation: str | None):
    if implementation not in _WAYS:
        raise ValueError(f"implementation must be one of {(*_WAYS,)}, got {implementation!r}.")
    return _WAYS[implementation]


def _check_new(q, k_cache, v_cache, k, v) -> tuple[Array, Array] | None:
    """Shapes and dtypes; (k, v) as arrays, or None if there is nothing to append."""
    shapes = f"q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}"
    if {q.ndim, k_cache.ndim, v_cache.ndim} != {4} or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            "q must be [b, sq, hq, d], k_cache and v_cache [cache_b, s, hk, d] or [num_blocks, "
            f"block_size, hk, d]; got {shapes}."
        )
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together.")
    if k is None or v is None:
        return None
    k, v = jnp.asarray(k), jnp.asarray(v)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (q.shape[0], k.shape[1] if k.ndim == 4 else "new", *cache.shape[2:])
        if x.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted} with {shapes}; got {x.shape}.")
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} must have the cache's dtype {cache.dtype}, got {x.dtype}.")
    return k, v


def _rotated(q, new, cos, sin, lengths, capacity: int, interleaved: bool, options: dict):
    """q and the new keys at their positions in the cache; values as they are."""
    if cos is None and sin is None:
        return q, new
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given together.")
    if new is None:
        raise ValueError("rotary_cos and rotary_sin need k and v, as in flash-attn.")
    cos, sin = jnp.asarray(cos), jnp.asarray(sin)
    rotary_dim = check_tables(cos, sin, q.shape[-1])
    if rotary_dim % 16:
        raise ValueError(f"rotary_dim must be a multiple of 16, got {rotary_dim}.")
    if cos.shape[0] < capacity:
        raise ValueError(
            f"rotary_cos must have a row for each of the cache's {capacity} positions, got "
            f"{cos.shape[0]}."
        )
    k, v = new
    moving = options["causal"] or options["window"] != (None, None)
    steps = np.arange(q.shape[1]) if moving else np.zeros(q.shape[1])
    q_positions = lengths[:, None] + steps.astype(np.int32)
    k_positions = lengths[:, None] + np.arange(k.shape[1], dtype=np.int32)
    q = rotate(q, cos, sin, jnp.asarray(q_positions), interleaved)
    return q, (rotate(k, cos, sin, jnp.asarray(k_positions), interleaved), v)


class _Cache:
    """Where the keys of each of b sequences are: position p of sequence n.

    Contiguous: cache[batch_idx[n], p]. Paged: blocks[table[n, p // block_size], p % block_size].
    """

    def __init__(self, cache: Array, b: int, batch_idx: Any, leftpad: Any, table: Any):
        self.b, self.batch_idx, self.leftpad, self.table = b, None, None, None
        self.given_table, self.blocks = table, cache
        if table is not None:
            if batch_idx is not None:
                raise ValueError("cache_batch_idx has no meaning with block_table.")
            self.table = _pages.check_block_table(table, cache, b, name="k_cache and v_cache")
            self.capacity = self.table.shape[1] * cache.shape[1]
        else:
            self.capacity = cache.shape[1]
            if batch_idx is not None:
                _values.check_range(batch_idx, 0, cache.shape[0] - 1, "cache_batch_idx")
                self.batch_idx = check_int32(batch_idx, "cache_batch_idx", (b,))
            elif cache.shape[0] < b:
                raise ValueError(f"q has {b} rows, the cache {cache.shape[0]}.")
        if leftpad is not None:
            _values.check_range(leftpad, 0, self.capacity, "cache_leftpad")
            self.leftpad = check_int32(leftpad, "cache_leftpad", (b,))

    def check_lengths(self, cache_seqlens: Any, new: int) -> np.ndarray | Array:
        """int32 [b], keys before the append, within the cache; numpy if the values are known."""
        if cache_seqlens is None:
            if new:
                raise ValueError("cache_seqlens must be given with k and v.")
            return np.full(self.b, self.capacity, np.int32)
        capacity, blocks = self.capacity, self.blocks

        def checker(lengths, *tables):
            if lengths.size and lengths.min() < 0:
                raise ValueError(f"cache_seqlens must be 0 or more, got {lengths.min()}.")
            if lengths.size and lengths.max() + new > capacity:
                raise ValueError(
                    f"the cache has room for {capacity} keys per sequence; cache_seqlens "
                    f"{lengths.max()} and {new} new ones do not fit."
                )
            for table in tables:
                _pages.check_block_ids(table, np.broadcast_to(lengths + new, len(table)), blocks)

        tables = () if self.given_table is None else (self.given_table,)
        _values.check(checker, cache_seqlens, *tables)
        if _values.known(cache_seqlens) and np.ndim(cache_seqlens) == 0:
            return np.full(self.b, as_int(cache_seqlens, "cache_seqlens"), np.int32)
        if np.ndim(cache_seqlens) == 0:  # a counter, as in lax.scan
            cache_seqlens = jnp.broadcast_to(cache_seqlens, (self.b,))
        lengths = check_int32(cache_seqlens, "cache_seqlens", (self.b,))
        return jnp.clip(lengths, 0, capacity)

    def ids(self) -> Array | None:
        """int32 [b, n], the blocks of each sequence; a row of the cache is a block of its own."""
        return self.table if self.batch_idx is None else self.batch_idx[:, None]

    def leftpad_mask(self, sq: int) -> IntervalMask | None:
        """Hides what is before the first real position."""
        if self.leftpad is None:
            return None
        lo = jnp.broadcast_to(self.leftpad[:, None], (self.b, sq))
        return IntervalMask(lo, jnp.full_like(lo, self.capacity))
