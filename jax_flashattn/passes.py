"""The two passes of attention as plain functions, for those who write their own backward.

    out, lse = merge_partials(*zip(*(attention_forward(q, k_part, v_part, ...) for each part)))
    delta = attention_delta(dout, out, dlse)
    dq_part, dk_part, dv_part = attention_backward(q, k_part, v_part, dout, lse, delta, ...)

With the lse and delta of *all* keys the parts' gradients add up exactly: dq is the sum over the
parts of the keys, dk and dv the sums over the parts of the queries. With a part's own lse or own
out they do not, and with its own out only dq and dk are wrong, which looks like training.
blockwise_attention and examples/context_parallel.py are built from these functions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _validate
from jax_flashattn._operands import statistics_dtype
from jax_flashattn._primitives import flash_backward, flash_forward
from jax_flashattn.masks import IntervalMask

_forward = jax.jit(flash_forward, static_argnums=1)
_backward = jax.jit(flash_backward, static_argnums=4)


def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    *,
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
    query_positions: Array | None = None,
    key_coordinates: Array | tuple[Any, Any] | None = None,
) -> tuple[Array, Array]:
    """The forward pass alone: attention over these keys, and what merging it needs.

    Not differentiable: flash_attention(..., return_lse=True) is, and attention_backward is what a
    custom_vjp around this function calls.

    Args:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d], all the keys or a part of them.
      value: [b, sk, hk, dv].
      causal: as all further arguments, see flash_attention. They describe these very keys; the
        mask of a part is that of the whole by IntervalMask.for_keys or for_positions.
      window: (left, right).
      scale: factor on the scores, default 1/sqrt(d).
      softcap: scores become softcap * tanh(scores / softcap).
      alibi_slopes: float32 [hq] or [b, hq].
      segment_ids: int32 [b, s] or a (query, key) pair.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].
      bias: [b or 1, hq or 1, sq or 1, sk or 1], dtype of query or float32, added to the scores of
        these very keys: of a part its slice of the whole's, where an axis is not 1. On CPU.
      sinks: float32 [hq]. Of parts of the keys only one may have them, and each row must see some
        of its keys: merge_partials(..., sinks=...) has no such condition.
      dropout_rate: probability of dropping a probability.
      dropout_key: one jax.random key. For every part the same, with the coordinates below.
      query_positions: int32 [b, sq], the key coordinate that each row is aligned with, which ALiBi
        and dropout count from; None is i + sk - sq, as for a call of its own.
      key_coordinates: (start, stride), key j has the coordinate start + stride * j, each an int or
        an int32 scalar; or int32 [b, 2]. With those of the whole, parts keep the whole's ALiBi
        and dropout. None is (0, 1). They do not move the mask.

    Returns:
      out [b, sq, hq, dv] in the dtype of query, and lse [b, hq, sq] in float32 (float64 for
      float64 inputs), -inf for rows that see none of the keys.

    Raises:
      TypeError, ValueError: as flash_attention.
      NotImplementedError: for a bias on CUDA.

    Source: Dao 2023 (FlashAttention-2), algorithm 1.

    Example:
      >>> import jax
      >>> from jax_flashattn import attention_forward
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
      >>> out, lse = attention_forward(q, k, v, causal=True)
      >>> out.shape, lse.shape
      ((1, 8, 2, 16), (1, 2, 8))
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
        query_positions=query_positions,
        key_coordinates=key_coordinates,
        deterministic=False,
    )
    return _forward(operands, spec)


def attention_backward(
    query: Array,
    key: Array,
    value: Array,
    dout: Array,
    lse: Array,
    delta: Array,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    lengths: Array | tuple[Array, Array] | None = None,
    mask: IntervalMask | None = None,
    bias: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    query_positions: Array | None = None,
    key_coordinates: Array | tuple[Any, Any] | None = None,
    deterministic: bool = False,
) -> tuple[Array, ...]:  # of three, or of four with a bias
    """The backward pass alone: what these rows and these keys add to the gradients.

    Args:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d], all the keys or a part of them.
      value: [b, sk, hk, dv].
      dout: [b, sq, hq, dv], cotangent of the whole output, in the dtype of query.
      lse: [b, hq, sq], log-sum-exp of each row over *all* its keys, merged if they come in parts.
        A row with lse -inf adds nothing.
      delta: [b, hq, sq], attention_delta of the whole output, merged if it comes in parts.
      causal: as all further arguments, see flash_attention; the same as in the forward pass.
      window: (left, right).
      scale: factor on the scores, default 1/sqrt(d).
      softcap: as in the forward pass.
      alibi_slopes: float32 [hq] or [b, hq].
      segment_ids: int32 [b, s] or a (query, key) pair.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].
      bias: [b or 1, hq or 1, sq or 1, sk or 1], the same as in the forward pass.
      dropout_rate: as in the forward pass.
      dropout_key: one jax.random key, the same.
      query_positions: int32 [b, sq], as in the forward pass.
      key_coordinates: (start, stride) or int32 [b, 2], as in the forward pass.
      deterministic: ask for bitwise repeatable results.

    Returns:
      (dq, dk, dv), with a bias (dq, dk, dv, dbias), of the shapes and dtypes of query, key, value
      and bias. Add 16-bit ones up in float32. Along an axis of 1 dbias is summed over these rows or
      keys alone: parts that share it add up.
      Sinks are in lse and delta: attention_sink_gradient has theirs.
      Inside shard_map nothing is summed over devices: gradients of an array that several devices
      share are the caller's to psum.

    Raises:
      TypeError, ValueError: as flash_attention, and for dout, lse or delta of another kind.
      NotImplementedError: for a bias on CUDA.

    Source: Dao 2023 (FlashAttention-2), algorithm 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashattn import attention_backward, attention_delta, attention_forward
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
      >>> out, lse = attention_forward(q, k, v, causal=True)
      >>> dout = jnp.ones_like(out)
      >>> delta = attention_delta(dout, out)
      >>> dq, dk, dv = attention_backward(q, k, v, dout, lse, delta, causal=True)
      >>> dk.shape
      (1, 8, 2, 16)
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
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        query_positions=query_positions,
        key_coordinates=key_coordinates,
        deterministic=deterministic,
    )
    b, sq, hq, _ = operands.query.shape
    statistics = statistics_dtype(operands.query.dtype)
    dv = operands.value.shape[3]
    _check_given("dout", dout, (b, sq, hq, dv), operands.query.dtype)
    _check_given("lse", lse, (b, hq, sq), statistics)
    _check_given("delta", delta, (b, hq, sq), statistics)
    # exp(score - inf) is 0, so a row that saw nothing has no probabilities here either (S11).
    saw_nothing = jnp.isneginf(lse)
    lse = jnp.where(saw_nothing, jnp.inf, lse)
    delta = jnp.where(saw_nothing, 0, delta)
    gradients = _backward(operands, dout, lse, delta, spec)
    return gradients if bias is not None else gradients[:3]


def _check_given(name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {x.shape}.")
    if x.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {x.dtype}.")
