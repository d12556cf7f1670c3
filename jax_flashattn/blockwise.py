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
from jax_flashattn.masks import IntervalMask
from jax_flashattn.partials import attention_delta, merge_partials
from jax_flashattn.passes import attention_backward, attention_forward


class _Plan(NamedTuple):
    """What is static about a call."""

    scale: float
    query_chunk: int
    key_chunk: int
    deterministic: bool


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
    segment_ids: Array | tuple[Array, Array] | None = None,
    lengths: Array | tuple[Array, Array] | None = None,
    mask: IntervalMask | None = None,
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
      segment_ids: int32 [b, s] or a (query, key) pair.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].
      deterministic: ask for a bitwise repeatable backward.
      return_lse: also return the log-sum-exp of each row's scores, differentiable.

    Returns:
      [b, sq, hq, dv] in the dtype of query; with return_lse also [b, hq, sq]. Partial results are
      added in float32 and rounded once; those of 16-bit inputs come from the kernels in 16 bits.

    Raises:
      TypeError, ValueError: as flash_attention, and for a chunk below 1.

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
        segment_ids=segment_ids,
        lengths=lengths,
        mask=mask,
        deterministic=deterministic,
    )
    sq, sk = operands.query.shape[1], operands.key.shape[1]
    chunks = (
        min(check_size("query_chunk", query_chunk, least=1), max(sq, 1)),
        min(check_size("key_chunk", key_chunk, least=1), max(sk, 1)),
    )
    plan = _Plan(spec.scale, *chunks, spec.deterministic)
    # Limits of a prepared call end at sk, so what fills up the last chunk of keys stays unseen.
    whole = IntervalMask(*_validate.row_limits(operands, spec))
    out, lse = _run(operands.query, operands.key, operands.value, whole, plan)
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


def _add(x: Array, part: Array, start: Array) -> Array:
    """Adds a part in the dtype of x: a chunk's gradients come in pieces."""
    return _put(x, _take(x, start, part.shape[1]) + part.astype(x.dtype), start)


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
    return jax.lax.fori_loop(0, pairs, at, state)


def _pair(plan: _Plan, query, key, value, mask: IntervalMask, row, column):
    """One pair of chunks: (query, key, value) and the mask between them."""
    rows = IntervalMask(*(_take(x, row, plan.query_chunk) for x in (mask.lo, mask.hi)))
    arrays = (
        _take(query, row, plan.query_chunk),
        _take(key, column, plan.key_chunk),
        _take(value, column, plan.key_chunk),
    )
    return arrays, rows.for_keys(column, plan.key_chunk)


def _pad_all(plan: _Plan, query, key, value, mask: IntervalMask):
    """All arrays in whole chunks, varying alike over the devices of a shard_map."""
    query, key, value, lo, hi = _compat.match_varying([query, key, value, mask.lo, mask.hi])
    limits = (_padded(x, 1, plan.query_chunk) for x in (lo, hi))  # 0, 0: sees nothing
    return (
        _padded(query, 1, plan.query_chunk),
        _padded(key, 1, plan.key_chunk),
        _padded(value, 1, plan.key_chunk),
        IntervalMask(*limits),
    )


def _chunks_forward(query, key, value, mask: IntervalMask, plan: _Plan) -> tuple[Array, Array]:
    sq, dtype = query.shape[1], query.dtype
    padded = _pad_all(plan, query, key, value, mask)
    b, rows, hq, _ = padded[0].shape
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def body(row, column, state):
        out, lse = state
        arrays, see = _pair(plan, *padded, row, column)
        part = attention_forward(*arrays, mask=see, scale=plan.scale)
        before = _take(out, row, plan.query_chunk), _take(lse, row, plan.query_chunk, axis=2)
        merged = merge_partials(*zip(before, part))
        return _put(out, merged[0], row), _put(lse, merged[1], row, axis=2)

    nothing = (
        jnp.zeros((b, rows, hq, value.shape[3]), wide),
        jnp.full((b, hq, rows), -jnp.inf, wide),
    )
    out, lse = _over_pairs(plan, padded[0], padded[1], body, nothing)
    return out[:, :sq].astype(dtype), lse[:, :, :sq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(query, key, value, mask: IntervalMask, plan: _Plan) -> tuple[Array, Array]:
    return _chunks_forward(query, key, value, mask, plan)


def _blockwise_forward(query, key, value, mask, plan):
    out, lse = _chunks_forward(query, key, value, mask, plan)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (query, key, value, mask, out, lse)


def _blockwise_backward(plan: _Plan, residuals, cotangents):
    query, key, value, mask, out, lse = residuals
    dout, dlse = cotangents
    # Of the whole rows, once: a chunk's own lse or out would give wrong gradients.
    delta = _padded(attention_delta(dout, out, dlse), 2, plan.query_chunk)
    lse = _padded(lse, 2, plan.query_chunk, -jnp.inf)
    dout = _padded(dout, 1, plan.query_chunk)
    padded = _pad_all(plan, query, key, value, mask)

    def body(row, column, state):
        arrays, see = _pair(plan, *padded, row, column)
        of_rows = (
            _take(dout, row, plan.query_chunk),
            _take(lse, row, plan.query_chunk, axis=2),
            _take(delta, row, plan.query_chunk, axis=2),
        )
        parts = attention_backward(
            *arrays, *of_rows, mask=see, scale=plan.scale, deterministic=plan.deterministic
        )
        starts = (row, column, column)
        return tuple(_add(x, part, at) for x, part, at in zip(state, parts, starts))

    nothing = tuple(jnp.zeros(x.shape, lse.dtype) for x in padded[:3])
    gradients = _over_pairs(plan, padded[0], padded[1], body, nothing)
    matched = [
        _compat.match_cotangent(gradient[:, : x.shape[1]].astype(x.dtype), x)
        for gradient, x in zip(gradients, (query, key, value))
    ]
    return (*matched, None)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
_run = jax.jit(_blockwise, static_argnums=4)  # an eager call is one program
