"""flash-attn's varlen functions: sequences of any lengths, one after the other without padding.

A varlen call is a dense call of one row whose segments are the sequences. Sequence n has segment
id n + 1 on both sides, so its queries meet its keys also where a neighbour is empty.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn import _pages, _torch_names, _values, packing
from jax_flashattn._torch_names import as_int
from jax_flashattn._validate import check_int32
from jax_flashattn.api import flash_attention

__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
    *,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    dropout_key: Any = None,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """Attention of sequences of any lengths, by flash-attn's name and arguments.

    Args:
      q: [total_q, heads, head_dim]; sequence n is rows cu_seqlens_q[n] to cu_seqlens_q[n + 1].
        Rows behind the last sequence are padding: their output is 0.
      k: [total_k, heads_k, head_dim], or with block_table [num_blocks, block_size, heads_k,
        head_dim].
      v: as k.
      cu_seqlens_q: int32 [n + 1].
      cu_seqlens_k: int32 [n + 1]; lengths may differ from the queries', and be 0.
      max_seqlen_q: the longest sequence of queries, a Python int.
      max_seqlen_k: the longest sequence of keys, a Python int.
      dropout_p: as in flash_attn_func.
      softmax_scale: as in flash_attn_func.
      causal: aligned bottom-right in every sequence.
      window_size: as in flash_attn_func, in every sequence.
      softcap: as in flash_attn_func.
      alibi_slopes: float32 [heads], or [n, heads]; the latter pads the sequences to max_seqlen.
      deterministic: as in flash_attn_func.
      return_attn_probs: as in flash_attn_func.
      block_table: int32 [n, blocks]: keys of sequence n are in these blocks of k and v, its length
        is cu_seqlens_k[n + 1] - cu_seqlens_k[n]. The blocks are gathered first.
      seqused_q: int32 [n], how many leading queries of each sequence count; default all.
      seqused_k: int32 [n], how many leading keys of each sequence count; default all.
      dropout_key: a jax.random key, required when dropout_p > 0.
      learnable_sink: [heads], a logit per head that joins the softmax's denominator.
      implementation: see flash_attention.

    Returns:
      out [total_q, heads, head_dim]; with return_attn_probs (out, softmax_lse, S_dmask):
      softmax_lse float32 [heads, total_q], -inf where a row sees nothing, and S_dmask
      [n, heads, max_seqlen_q, max_seqlen_k] as in flash_attn_func, None without dropout.

    Raises:
      ValueError: for bad shapes and, where they are not traced, cu_seqlens that do not start at 0,
        decrease or exceed the array, a longer sequence than max_seqlen, block ids out of range.
      TypeError: for a wrong dtype or type.

    Source: flash-attn 2.8, flash_attn_interface.py; seqused from flash-attn 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_varlen_func
      >>> q, k = jnp.ones((5, 4, 16)), jnp.ones((9, 2, 16))
      >>> cu_q, cu_k = jnp.array([0, 2, 5]), jnp.array([0, 6, 9])
      >>> flash_attn_varlen_func(q, k, k, cu_q, cu_k, 3, 6, causal=True).shape
      (5, 4, 16)
    """
    options = _torch_names.native_options(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        dropout_key=dropout_key,
        learnable_sink=learnable_sink,
        implementation=implementation,
    )
    q, k, v = _check_ranks(q, k, v, block_table)
    longest_q, longest_k = (
        as_int(max_seqlen_q, "max_seqlen_q"),
        as_int(max_seqlen_k, "max_seqlen_k"),
    )
    query = _side("q", cu_seqlens_q, seqused_q, q.shape[0], longest_q)
    if block_table is not None:
        k, v, key = _paged_side(k, v, block_table, cu_seqlens_k, seqused_k, longest_k)
    elif (cu_seqlens_k is cu_seqlens_q and seqused_k is seqused_q) and len(q) == len(k):
        key = query  # one array of segment ids then serves both sides
    else:
        key = _side("k", cu_seqlens_k, seqused_k, k.shape[0], longest_k)
    if query.starts.shape != key.starts.shape:
        raise ValueError(
            f"cu_seqlens_q has {query.starts.size} sequences, cu_seqlens_k {key.starts.size}."
        )
    per_sequence = alibi_slopes is not None and np.ndim(alibi_slopes) == 2
    attend = _padded if per_sequence else _packed
    out, lse, probabilities = attend(q, k, v, query, key, options, bool(return_attn_probs))
    return (out, lse, probabilities) if return_attn_probs else out


class _Side(NamedTuple):
    """Where the sequences of one side are: starts and lengths int32 [n], segment ids [total]."""

    starts: Array
    lengths: Array
    ids: Array
    longest: int


def _check_ranks(q, k, v, block_table) -> tuple[Array, Array, Array]:
    key_ndim = 3 if block_table is None else 4
    for name, x, ndim in (("q", q, 3), ("k", k, key_ndim), ("v", v, key_ndim)):
        if np.ndim(x) != ndim:
            what = "[total, heads, head_dim]"
            if ndim == 4:
                what = "[num_blocks, block_size, heads, head_dim] with block_table"
            raise ValueError(f"{name} must have shape {what}, got {np.shape(x)}.")
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def _side(name: str, cu_seqlens, used, total: int, longest: int) -> _Side:
    given = cu_seqlens
    cu_seqlens = packing.check_cu_seqlens(cu_seqlens, total, f"cu_seqlens_{name}")
    if cu_seqlens.size < 2:
        raise ValueError(f"cu_seqlens_{name} must have at least one sequence, got shape (1,).")

    def check_longest(values):
        most = np.diff(values).max()
        if most > longest:
            raise ValueError(f"max_seqlen_{name} is {longest}, a sequence has {most} tokens.")

    _values.check(check_longest, given)
    starts, lengths = cu_seqlens[:-1], jnp.diff(cu_seqlens)
    ids = packing.segment_ids_from_cu_seqlens(cu_seqlens, total)
    if used is not None:
        _values.check_range(used, 0, longest, f"seqused_{name}")
        lengths = jnp.clip(check_int32(used, f"seqused_{name}", lengths.shape), 0, lengths)
        real = jnp.arange(total, dtype=jnp.int32) < (starts + lengths)[ids - 1]
        ids = jnp.where(real, ids, 0)
    return _Side(starts, lengths, ids, longest)


def _paged_side(k, v, block_table, cu_seqlens_k, seqused_k, longest: int):
    """Keys and values [n * room, heads, head_dim] of gathered blocks, and where sequences are."""
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must have the same blocks, got {k.shape} and {v.shape}.")
    n = np.shape(cu_seqlens_k)[0] - 1
    table = _pages.check_block_table(block_table, k, n, name="k")
    _values.check(
        lambda cu, ids: _pages.check_block_ids(ids, np.diff(cu), k), cu_seqlens_k, block_table
    )
    cu_seqlens_k = check_int32(cu_seqlens_k, "cu_seqlens_k", (n + 1,))
    k, v = (_pages.gather(x, table) for x in (k, v))
    room = k.shape[1]
    lengths = jnp.clip(jnp.diff(cu_seqlens_k), 0, room)
    if seqused_k is not None:
        lengths = jnp.clip(check_int32(seqused_k, "seqused_k", (n,)), 0, lengths)
    rows = np.arange(n + 1, dtype=np.int32) * room
    side = _side("k", rows, lengths, n * room, room)
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    return k, v, side._replace(longest=longest)


def _packed(q, k, v, query: _Side, key: _Side, options: dict, want_probabilities: bool):
    """One row, one segment per sequence."""
    ids = query.ids[None] if key is query else (query.ids[None], key.ids[None])
    options = options | {"segment_ids": ids}
    probabilities = None
    if want_probabilities and options["dropout_rate"]:
        shape = (query.starts.size, q.shape[1], query.longest, key.longest)
        _torch_names.check_probability_bytes(shape, q.dtype)
        matrix = _torch_names.signed_probabilities(q[None], k[None], options)[0]
        probabilities = _blocks(matrix, query, key)
    out, lse = flash_attention(q[None], k[None], v[None], return_lse=True, **options)
    return out[0], lse[0], probabilities


def _blocks(matrix: Array, query: _Side, key: _Side) -> Array:
    """[n, heads, longest q, longest k], the diagonal blocks of [heads, total_q, total_k]."""
    row, column = jnp.arange(query.longest), jnp.arange(key.longest)
    i = (query.starts[:, None] + row)[:, None, :, None]
    j = (key.starts[:, None] + column)[:, None, None, :]
    head = jnp.arange(matrix.shape[0])[None, :, None, None]
    real = (row < query.lengths[:, None])[:, None, :, None]
    real &= (column < key.lengths[:, None])[:, None, None, :]
    return jnp.where(real, matrix.at[head, i, j].get(mode="clip"), 0)


def _padded(q, k, v, query: _Side, key: _Side, options: dict, want_probabilities: bool):
    """One row per sequence, padded to the longest: for options that differ between sequences."""
    q, k, v = (
        x.at[side.starts[:, None] + jnp.arange(side.longest)].get(mode="clip")
        for x, side in ((q, query), (k, key), (v, key))
    )
    lengths = jnp.minimum(query.lengths, query.longest), jnp.minimum(key.lengths, key.longest)
    options = options | {"lengths": lengths}
    probabilities = None
    if want_probabilities and options["dropout_rate"]:
        probabilities = _torch_names.signed_probabilities(q, k, options)
    out, lse = flash_attention(q, k, v, return_lse=True, **options)
    n = jnp.maximum(query.ids - 1, 0)
    place = jnp.arange(query.ids.size, dtype=jnp.int32) - query.starts[n]
    real = (query.ids > 0) & (place < query.longest)
    out = out.at[n, place].get(mode="fill", fill_value=0)
    lse = lse.swapaxes(1, 2).at[n, place].get(mode="fill", fill_value=0)
    return (
        jnp.where(real[:, None, None], out, 0),
        jnp.where(real[:, None], lse, -jnp.inf).T,
        probabilities,
    )


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    dropout_key: Any = None,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """flash_attn_varlen_func of keys and values in one array, whose gradient is one array.

    Args:
      q: [total_q, heads, head_dim].
      kv: [total_k, 2, heads_k, head_dim].
      cu_seqlens_q: int32 [n + 1].
      cu_seqlens_k: int32 [n + 1].
      max_seqlen_q: the longest sequence of queries, a Python int.
      max_seqlen_k: the longest sequence of keys, a Python int.
      The other arguments are those of flash_attn_varlen_func.

    Returns:
      as flash_attn_varlen_func.

    Raises:
      ValueError: for a wrong middle axis, and as flash_attn_varlen_func.

    Source: flash-attn 2.8, flash_attn_interface.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_varlen_kvpacked_func
      >>> cu_q, cu_k = jnp.array([0, 2, 5]), jnp.array([0, 6, 9])
      >>> q, kv = jnp.ones((5, 4, 16)), jnp.ones((9, 2, 2, 16))
      >>> flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 3, 6).shape
      (5, 4, 16)
    """
    k, v = _torch_names.unpack(kv, 2, 4, "kv")
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p),
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_attn_probs,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        dropout_key=dropout_key,
        learnable_sink=learnable_sink,
        implementation=implementation,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused: Array | None = None,
    dropout_key: Any = None,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """flash_attn_varlen_func of q, k and v in one array, whose gradient is one array.

    Args:
      qkv: [total, 3, heads, head_dim].
      cu_seqlens: int32 [n + 1].
      max_seqlen: the longest sequence, a Python int.
      seqused: int32 [n], how many leading tokens of each sequence count; default all.
      The other arguments are those of flash_attn_varlen_func.

    Returns:
      as flash_attn_varlen_func.

    Raises:
      ValueError: for a wrong middle axis, and as flash_attn_varlen_func.

    Source: flash-attn 2.8, flash_attn_interface.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_varlen_qkvpacked_func
      >>> qkv = jnp.ones((9, 3, 4, 16))
      >>> flash_attn_varlen_qkvpacked_func(qkv, jnp.array([0, 6, 9]), 6, causal=True).shape
      (9, 4, 16)
    """
    q, k, v = _torch_names.unpack(qkv, 3, 4, "qkv")
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p),
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_attn_probs,
        seqused_q=seqused,
        seqused_k=seqused,
        dropout_key=dropout_key,
        learnable_sink=learnable_sink,
        implementation=implementation,
    )
