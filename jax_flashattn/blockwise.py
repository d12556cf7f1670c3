"""Attention chunk by chunk, in a loop of the caller's making: BPT on one device.

Built from the public pieces alone (masks, passes, partials), as a worked example of them: the same
five lines per chunk carry ring attention.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jax_flashattn import _compat, _validate
from jax_flashattn._checks import check_size
from jax_flashattn._features import key_words
from jax_flashattn._operands import statistics_dtype
from jax_flashattn.masks import IntervalMask
from jax_flashattn.partials import attention_delta, attention_sink_gradient, merge_partials
from jax_flashattn.passes import attention_backward, attention_forward


class _Plan(NamedTuple):
    """What is static about a call."""

    scale: float
    query_chunk: int
    key_chunk: int
    deterministic: bool
    softcap: float
    dropout_rate: float


class _Rows(NamedTuple):
    """What has no gradient: mask and features of the whole.

    mask [b, sq]; position int32 [b, sq], the rows' aligned key coordinates, slopes [b, hq] and the
    words of the dropout key, None if not needed.
    """

    mask: IntervalMask
    position: Array | None
    slopes: Array | None
    dropout_key: Array | None


def blockwise_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    query_chunk: int,
    key_chunk: int,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    lengths: Array | tuple[Array, Array] | None = None,
    mask: IntervalMask | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:  # Array, or (Array, Array) with return_lse
    """flash_attention in chunks: the same value and gradients, one kernel call per pair of chunks.

    flash_attention is blockwise inside and needs no more memory than this, so use it unless a call
    must be small: to interleave other work, to bound a kernel's time, or as a model for a loop of
    your own (docs/parts.md). The program does not grow with the number of chunks. In explicit
    sharding mode call it through jax.sharding.auto_axes.

    Args:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv].
      query_chunk: rows of a chunk; the last chunk may be shorter.
      key_chunk: keys of a chunk; the last chunk may be shorter.
      causal: as all further arguments, see flash_attention; they describe the whole.
      window: (left, right).
      scale: factor on the scores, default 1/sqrt(d).
      softcap: scores become softcap * tanh(scores / softcap).
      alibi_slopes: float32 [hq] or [b, hq].
      segment_ids: int32 [b, s] or a (query, key) pair.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].
      bias: [b or 1, hq or 1, sq or 1, sk or 1], dtype of query or float32, with a gradient. On CPU.
      sinks: float32 [hq], with a gradient.
      dropout_rate: probability of dropping a probability.
      dropout_key: one jax.random key; drops what it drops in one call.
      deterministic: ask for a bitwise repeatable backward.
      return_lse: also return the log-sum-exp of each row's scores, differentiable.

    Returns:
      [b, sq, hq, dv] in the dtype of query; with return_lse also [b, hq, sq]. Partial results are
      added in float32 and rounded once; those of 16-bit inputs come from the kernels in 16 bits.

    Raises:
      TypeError, ValueError: as flash_attention, and for a chunk below 1.
      NotImplementedError: for a bias on CUDA.

    Source: Liu & Abbeel 2023 (Blockwise Parallel Transformer).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashattn import blockwise_attention, flash_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 50, 2, 16))
      >>> out = blockwise_attention(q, k, v, query_chunk=16, key_chunk=20, causal=True)
      >>> bool(jnp.allclose(out, flash_attention(q, k, v, causal=True), atol=1e-6))
      True
    """
    operands, spec = _validate.prepare(
        query,
        key,
        value,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        segment_ids=segment_ids,
        lengths=lengths,
        mask=mask,
        bias=bias,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
    )
    sq, sk = operands.query.shape[1], operands.key.shape[1]
    chunks = (
        min(check_size("query_chunk", query_chunk, least=1), max(sq, 1)),
        min(check_size("key_chunk", key_chunk, least=1), max(sk, 1)),
    )
    rate = 0.0 if operands.dropout is None else float(dropout_rate)
    plan = _Plan(spec.scale, *chunks, spec.deterministic, spec.softcap, rate)
    position = None
    if operands.slopes is not None or operands.dropout is not None:
        position = jnp.broadcast_to(_validate.row_positions(operands), operands.query.shape[:2])
    # Limits of a prepared call end at sk, so what fills up the last chunk of keys stays unseen.
    rows = _Rows(
        IntervalMask(*_validate.row_limits(operands, spec)),
        position,
        operands.slopes,
        key_words(dropout_key) if rate else None,
    )
    sinks = None if sinks is None else jnp.asarray(sinks)
    out, lse = _run(*operands[:3], operands.bias, sinks, rows, plan)
    return (out, lse) if return_lse else out


def _padded(x: Array, axis: int, chunk: int, fill: Any = 0) -> Array:
    """x with its axis filled up to whole chunks."""
    behind = -x.shape[axis] % chunk
    if not behind:
        return x
    widths = [(0, behind if n == axis else 0) for n in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _take(x: Array, start: Array, chunk: int, axis: int = 1) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis)


def _put(x: Array, part: Array, start: Array, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)


def _add(x: Array, part: Array, starts: dict[int, Array]) -> Array:
    """Adds a part that starts there along these axes, in the dtype of x."""
    at = [starts.get(axis, jnp.zeros((), jnp.int32)) for axis in range(x.ndim)]
    whole = jax.lax.dynamic_slice(x, at, part.shape) + part.astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, whole, at)


def _over_pairs(plan: _Plan, query: Array, key: Array, body, state):
    """state = body(first row, first key, state) over all pairs of chunks, rows outside."""
    key_chunks = key.shape[1] // plan.key_chunk
    pairs = query.shape[1] // plan.query_chunk * key_chunks

    def at(n, state):
        return body(n // key_chunks * plan.query_chunk, n % key_chunks * plan.key_chunk, state)

    if not pairs:
        return state
    # Inside shard_map what a loop carries must vary over the devices from the start.
    state = tuple(_compat.match_varying([*state, query])[:-1])
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(pairs), at, state)


def _bias_cuts(bias: Array | None, plan: _Plan, row: Any = 0, column: Any = 0) -> list[tuple]:
    """(axis, start, chunk) of what a pair takes of a bias; an axis of 1 is the same for all."""
    cuts = (2, row, plan.query_chunk), (3, column, plan.key_chunk)
    return [] if bias is None else [cut for cut in cuts if bias.shape[cut[0]] != 1]


def _pair(plan: _Plan, query, key, value, bias, rows: _Rows, row, column):
    """One pair of chunks: (query, key, value), and what lies between them as options of a pass."""
    see, position = jax.tree.map(
        lambda x: _take(x, row, plan.query_chunk), (rows.mask, rows.position)
    )
    arrays = (
        _take(query, row, plan.query_chunk),
        _take(key, column, plan.key_chunk),
        _take(value, column, plan.key_chunk),
    )
    for axis, start, chunk in _bias_cuts(bias, plan, row, column):
        bias = _take(bias, start, chunk, axis)
    options = {
        "mask": see.for_keys(column, plan.key_chunk),
        "bias": bias,
        "scale": plan.scale,
        "softcap": plan.softcap,
        "alibi_slopes": rows.slopes,
        "dropout_rate": plan.dropout_rate,
        "dropout_key": rows.dropout_key,
        "query_positions": position,
        "key_coordinates": (column, 1),
    }
    return arrays, options


def _pad_all(plan: _Plan, query, key, value, bias, rows: _Rows):
    """All arrays in whole chunks, varying alike over the devices of a shard_map."""
    leaves, structure = jax.tree.flatten((query, key, value, bias, rows))
    query, key, value, bias, rows = structure.unflatten(_compat.match_varying(leaves))
    mask, position = jax.tree.map(  # limits 0, 0: sees nothing
        lambda x: _padded(x, 1, plan.query_chunk), (rows.mask, rows.position)
    )
    for axis, _, chunk in _bias_cuts(bias, plan):
        bias = _padded(bias, axis, chunk)
    return (
        _padded(query, 1, plan.query_chunk),
        _padded(key, 1, plan.key_chunk),
        _padded(value, 1, plan.key_chunk),
        bias,
        rows._replace(mask=mask, position=position),
    )


def _chunks_forward(
    query, key, value, bias, sinks, rows: _Rows, plan: _Plan
) -> tuple[Array, Array]:
    sq, dtype = query.shape[1], query.dtype
    padded = _pad_all(plan, query, key, value, bias, rows)
    b, sq_padded, hq, _ = padded[0].shape
    wide = statistics_dtype(dtype)

    def body(row, column, state):
        out, lse = state
        arrays, options = _pair(plan, *padded, row, column)
        part = attention_forward(*arrays, **options)
        before = _take(out, row, plan.query_chunk), _take(lse, row, plan.query_chunk, axis=2)
        merged = merge_partials(*zip(before, part))
        return _put(out, merged[0], row), _put(lse, merged[1], row, axis=2)

    nothing = (
        jnp.zeros((b, sq_padded, hq, value.shape[3]), wide),
        jnp.full((b, hq, sq_padded), -jnp.inf, wide),
    )
    out, lse = _over_pairs(plan, padded[0], padded[1], body, nothing)
    if sinks is not None:
        out, lse = merge_partials([out], [lse], sinks=sinks)
    return out[:, :sq].astype(dtype), lse[:, :, :sq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blockwise(query, key, value, bias, sinks, rows: _Rows, plan: _Plan) -> tuple[Array, Array]:
    return _chunks_forward(query, key, value, bias, sinks, rows, plan)


def _blockwise_forward(query, key, value, bias, sinks, rows, plan):
    out, lse = _chunks_forward(query, key, value, bias, sinks, rows, plan)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (query, key, value, bias, sinks, rows, out, lse)


def _blockwise_backward(plan: _Plan, residuals, cotangents):
    query, key, value, bias, sinks, rows, out, lse = residuals
    dout, dlse = cotangents
    # Of the whole rows, once: a chunk's own lse or out would give wrong gradients.
    delta = attention_delta(dout, out, dlse)
    dsinks = None
    if sinks is not None:
        dsinks = _compat.match_cotangent(attention_sink_gradient(sinks, lse, delta), sinks)
    delta, lse = _padded(delta, 2, plan.query_chunk), _padded(lse, 2, plan.query_chunk, -jnp.inf)
    dout = _padded(dout, 1, plan.query_chunk)
    padded = _pad_all(plan, query, key, value, bias, rows)

    def body(row, column, state):
        arrays, options = _pair(plan, *padded, row, column)
        of_rows = (
            _take(dout, row, plan.query_chunk),
            _take(lse, row, plan.query_chunk, axis=2),
            _take(delta, row, plan.query_chunk, axis=2),
        )
        parts = attention_backward(*arrays, *of_rows, **options, deterministic=plan.deterministic)
        of_bias = {axis: start for axis, start, _ in _bias_cuts(padded[3], plan, row, column)}
        starts = {1: row}, {1: column}, {1: column}, of_bias
        return tuple(_add(x, part, at) for x, part, at in zip(state, parts, starts))

    nothing = tuple(jnp.zeros(x.shape, lse.dtype) for x in padded[:4] if x is not None)
    gradients = _over_pairs(plan, padded[0], padded[1], body, nothing)
    dq, dk, dv, *dbias = [
        _compat.match_cotangent(g[tuple(map(slice, x.shape))].astype(x.dtype), x)
        for g, x in zip(gradients, (query, key, value, bias))
    ]
    return dq, dk, dv, *(dbias or [None]), dsinks, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
_run = jax.jit(_blockwise, static_argnums=6)  # an eager call is one program
