"""Every check and every user-facing error: public arguments in, (Operands, AttentionSpec) out."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_flashattn import _features, _mask
from jax_flashattn._checks import as_array, check_int32, check_number, check_window
from jax_flashattn._operands import Operands
from jax_flashattn._spec import AttentionSpec
from jax_flashattn.masks import IntervalMask

MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16", "float32", "float64")
IMPLEMENTATIONS = (None, "kernel", "reference")


def prepare(
    query: Any,
    key: Any,
    value: Any,
    *,
    causal: bool,
    window: Any,
    scale: Any,
    segment_ids: Any,
    lengths: Any,
    mask: Any,
    deterministic: bool,
    softcap: Any = None,
    alibi_slopes: Any = None,
    bias: Any = None,
    sinks: Any = None,
    dropout_rate: Any = 0.0,
    dropout_key: Any = None,
    query_positions: Any = None,
    key_coordinates: Any = None,
    capacity: int | None = None,
) -> tuple[Operands, AttentionSpec]:
    """Checks a call and brings it into the one form that the rest of the library knows.

    With a capacity, key and value are blocks of a cache that has so many keys per sequence.
    """
    query, key, value = check_arrays(query, key, value, cached=capacity is not None)
    b, sq, hq, d = query.shape
    sk = key.shape[1] if capacity is None else capacity
    left, right = check_window(window)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}.")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be a bool, got {deterministic!r}.")
    if causal:
        right = 0 if right is None else min(right, 0)  # S2
    left, right = _mask.normalized_window(left, right, sq, sk)
    keep_threshold, dropout = _features.check_dropout(dropout_rate, dropout_key, b, hq)
    spec = AttentionSpec(
        check_scale(scale, d), left, right, deterministic,
        _features.check_softcap(softcap), keep_threshold,
    )  # fmt: skip
    lengths = check_lengths(lengths, b)
    segment_ids = check_segment_ids(segment_ids, b, sq, sk)
    mask = check_mask(mask, b, sq)
    operands = Operands(
        query, key, value, lengths,
        slopes=_features.check_slopes(alibi_slopes, b, hq),
        sinks=_features.check_sinks(sinks, query),
        dropout=dropout,
        bias=_features.check_bias(bias, query, sk),
        position=_features.check_positions(query_positions, b, sq),
        key_coordinates=_features.check_coordinates(key_coordinates, b),
    )  # fmt: skip
    if segment_ids is not None or mask is not None:
        lo, hi, position = _intervals(segment_ids, mask, lengths, left, right, (b, sq, sk))
        position = position if operands.position is None else operands.position
        operands = operands._replace(lengths=None, lo=lo, hi=hi, position=position)
        spec = dataclasses.replace(spec, left=None, right=None)
    if operands.slopes is None and operands.dropout is None:  # nothing reads coordinates
        operands = operands._replace(position=None, key_coordinates=None)
    return operands, spec


def _intervals(segment_ids, mask, lengths, left, right, sizes) -> tuple[Array, Array, Array]:
    """Everything that hides keys, as intervals [b, sq], and the aligned key of each row."""
    b, sq, sk = sizes
    if segment_ids is None:
        limits = _mask.arithmetic_intervals(sq, sk, left, right, lengths)
        position = _mask.arithmetic_positions(sq, sk, lengths)
    else:
        q_ids, k_ids = segment_ids
        if lengths is not None:  # what lies behind a length is padding
            k_ids = q_ids if k_ids is None else k_ids
            q_ids = jnp.where(jnp.arange(sq)[None] < lengths[:, :1], q_ids, 0)
            k_ids = jnp.where(jnp.arange(sk)[None] < lengths[:, 1:], k_ids, 0)
        rows = _mask.segment_rows(q_ids, k_ids)
        limits, position = _mask.segment_intervals(rows, left, right), rows.centre
    if mask is not None:
        limits = _mask.intersect(limits, (mask.lo, mask.hi))
    lo, hi, position = (jnp.broadcast_to(x, (b, sq)) for x in (*limits, position))
    return lo, hi, position


def row_limits(operands: Operands, spec: AttentionSpec) -> _mask.Intervals:
    """What every row of a prepared call sees, as intervals [b or 1, sq]."""
    if operands.lo is not None and operands.hi is not None:
        return operands.lo, operands.hi
    sq, sk = operands.query.shape[1], operands.key.shape[1]
    return _mask.arithmetic_intervals(sq, sk, spec.left, spec.right, operands.lengths)


def row_positions(operands: Operands) -> Array:
    """The aligned key coordinate of every row of a prepared call, [b or 1, sq] (S9, S12)."""
    if operands.position is not None:
        return operands.position
    sq, sk = operands.query.shape[1], operands.key.shape[1]
    return _mask.arithmetic_positions(sq, sk, operands.lengths)


def check_arrays(
    query: Any, key: Any, value: Any, *, cached: bool = False
) -> tuple[Array, Array, Array]:
    """Ranks, shapes and dtypes of query, key and value; a cache may have more or fewer rows."""
    named = {"query": query, "key": key, "value": value}
    query, key, value = arrays = [as_array(x, name) for name, x in named.items()]
    for name, x in zip(named, arrays):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, sequence, heads, head_dim], "
                f"got shape {x.shape}."
            )
    dtypes = [str(x.dtype) for x in arrays]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        raise TypeError(
            "query, key and value must share one dtype of "
            f"{', '.join(DTYPES)}; got {', '.join(dtypes)}."
        )
    b, _, hq, d = query.shape
    _, sk, hk, _ = key.shape
    b = key.shape[0] if cached else b
    if key.shape != (b, sk, hk, d) or value.shape[:3] != (b, sk, hk):
        raise ValueError(
            "key must be [b, sk, hk, d] and value [b, sk, hk, dv] with query [b, sq, hq, d]; "
            f"got query {query.shape}, key {key.shape}, value {value.shape}."
        )
    if (hk == 0 and hq != 0) or (hk != 0 and hq % hk != 0):
        raise ValueError(
            "the number of key heads must divide the number of query heads, "
            f"got {hq} query heads and {hk} key heads."
        )
    for name, width in (("head_dim of query and key", d), ("head_dim of value", value.shape[3])):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be 1 to {MAX_HEAD_DIM}, got {width}.")
    return query, key, value


def check_scale(scale: Any, d: int) -> float:
    """The factor on scores: 1/sqrt(d) unless given."""
    if scale is None:
        return 1.0 / math.sqrt(d)
    return check_number(scale, "scale", "multiply the query for a traced one")


def check_lengths(lengths: Any, b: int) -> Array | None:
    """[b] for both sides or a (query, key) pair of them, as int32 [b, 2]."""
    if lengths is None:
        return None
    pair = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    if len(pair) != 2:
        raise ValueError(f"lengths must be an array or a (query, key) pair, got {len(pair)} items.")
    names = ("query lengths", "key lengths") if isinstance(lengths, tuple) else ("lengths",) * 2
    return jnp.stack([check_int32(x, name, (b,)) for x, name in zip(pair, names)], axis=1)


def check_segment_ids(ids: Any, b: int, sq: int, sk: int) -> tuple[Array, Array | None] | None:
    """(query ids, key ids); key ids None means the query's."""
    if ids is None:
        return None
    if isinstance(ids, tuple):
        if len(ids) != 2:
            raise ValueError(
                f"segment_ids must be an array or a (query, key) pair, got {len(ids)} items."
            )
        return (
            check_int32(ids[0], "query segment_ids", (b, sq)),
            check_int32(ids[1], "key segment_ids", (b, sk)),
        )
    if sq != sk:
        raise ValueError(
            "segment_ids must be a (query, key) pair when the sequence lengths differ, "
            f"got one array for {sq} queries and {sk} keys."
        )
    return check_int32(ids, "segment_ids", (b, sq)), None


def check_mask(mask: Any, b: int, sq: int) -> IntervalMask | None:
    """An IntervalMask of [b or 1, sq]."""
    if mask is None:
        return None
    if not isinstance(mask, IntervalMask):
        raise TypeError(
            f"mask must be an IntervalMask, got {type(mask).__name__}; boolean masks are taken by "
            "jax_flashattn.flax.attention_fn."
        )
    shape = jnp.shape(mask.lo)
    if len(shape) != 2 or shape[0] not in (1, b) or shape[1] != sq:
        raise ValueError(f"mask.lo must have shape ({b} or 1, {sq}), got {shape}.")
    return IntervalMask(
        check_int32(mask.lo, "mask.lo", shape), check_int32(mask.hi, "mask.hi", shape)
    )


def check_implementation(implementation: Any) -> None:
    """One of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}."
        )


def check_differentiation(differentiation: Any) -> None:
    """One of "reverse" and "forward"."""
    if differentiation not in ("reverse", "forward"):
        raise ValueError(
            f"differentiation must be 'reverse' or 'forward', got {differentiation!r}."
        )
