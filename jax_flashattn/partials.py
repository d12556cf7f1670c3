"""Attention over parts of the keys, put together: merge the parts' results, share one delta."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn._checks import as_array
from jax_flashattn._operands import statistics_dtype


def _wide(x: Array) -> Array:
    """In float32, or float64 if it is."""
    return x.astype(statistics_dtype(x.dtype))


def _like_out(statistic: Array) -> Array:
    """[..., h, s] to [..., s, h, 1]."""
    return statistic.swapaxes(-1, -2)[..., None]


def merge_partials(
    outs: Sequence[Array] | Array, lses: Sequence[Array] | Array, *, sinks: Array | None = None
) -> tuple[Array, Array]:
    """Attention over all keys from attention over disjoint parts of them.

    Each part is what flash_attention(..., return_lse=True) or attention_forward gives for some of
    the keys; the merge is exact, in any order and nesting. A part in which a row sees nothing (lse
    -inf) has no effect on it, and a row that sees nothing in any part is 0 with lse -inf (S11).
    Differentiable.

    Args:
      outs: [b, sq, hq, dv], one per part: a sequence of them, or one array with a leading axis.
      lses: [b, hq, sq], one per part, likewise.
      sinks: [hq], the logits that flash_attention(..., sinks=...) lets join the denominator (S15).
        They join once: in the last merge, if the parts themselves know nothing of them.

    Returns:
      (out, lse) in float32, or float64 if a part is: keep them so while merging further, and cast
      at the end. Rounding every step costs accuracy that grows with the number of parts.

    Raises:
      ValueError: for shapes that do not fit, or no parts.
      TypeError: for what is not an array.

    Source: Dao et al. 2022 (FlashAttention), section 3.1; Liu et al. 2023 (Ring Attention).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashattn import flash_attention, merge_partials
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
      >>> halves = [flash_attention(q, k[:, s], v[:, s], return_lse=True)
      ...           for s in (slice(0, 3), slice(3, 8))]
      >>> out, lse = merge_partials(*zip(*halves))
      >>> bool(jnp.allclose(out, flash_attention(q, k, v), atol=1e-6))
      True
    """
    outs = [_wide(as_array(x, "outs")) for x in outs]
    lses = [_wide(as_array(x, "lses")) for x in lses]
    _check_parts(outs, lses)
    # The largest cancels, so it needs no gradient: it only keeps exp in range.
    largest = jax.lax.stop_gradient(jnp.stack(lses).max(0))
    sees_any = ~jnp.isneginf(largest)
    shown = [] if sinks is None else [_sink_rows(sinks, largest)]
    for sink in shown:
        largest = jnp.maximum(largest, jax.lax.stop_gradient(sink))
    largest = jnp.where(sees_any, largest, 0)
    weights = [jnp.exp(lse - largest) for lse in lses]
    # A row that sees nothing stays empty, its sink notwithstanding (S11).
    shown = [jnp.exp(jnp.where(sees_any, sink - largest, -jnp.inf)) for sink in shown]
    total = jnp.where(sees_any, functools.reduce(jnp.add, [*weights, *shown]), 1)
    # An empty part cannot matter, not even as 0 * NaN, nor can its gradient.
    outs = [jnp.where(_like_out(jnp.isneginf(lse)), 0, out) for out, lse in zip(outs, lses)]
    terms = [_like_out(weight / total) * out for out, weight in zip(outs, weights)]
    return functools.reduce(jnp.add, terms), jnp.where(sees_any, largest + jnp.log(total), -jnp.inf)


def _check_parts(outs: list[Array], lses: list[Array]) -> None:
    shapes = [x.shape for x in outs], [x.shape for x in lses]
    b, sq, hq, _ = shape = shapes[0][0] if outs and outs[0].ndim == 4 else (0,) * 4
    wanted = [shape] * len(outs), [(b, hq, sq)] * len(outs)
    if not outs or shapes != wanted:
        raise ValueError(
            "merge_partials needs one out [b, sq, hq, dv] and one lse [b, hq, sq] per part, all of "
            f"the same sizes; got outs {shapes[0]} and lses {shapes[1]}."
        )


def _sink_rows(sinks: Array, lse: Array) -> Array:
    """[hq] as [1, hq, 1] in the dtype of lse [b, hq, sq]."""
    sinks = as_array(sinks, "sinks")
    if sinks.shape != lse.shape[1:2]:
        raise ValueError(f"sinks must have shape {lse.shape[1:2]}, got {sinks.shape}.")
    return sinks.astype(lse.dtype)[None, :, None]


def attention_sink_gradient(sinks: Array, lse: Array, delta: Array) -> Array:
    """The gradient of sinks, from what the backward of every part shares (S15).

    Args:
      sinks: [hq] or [b, hq].
      lse: [b, hq, sq], of all keys and the sinks.
      delta: [b, hq, sq], attention_delta of the whole output.

    Returns:
      the shape and dtype of sinks, summed over what it lacks.

    Source: docs/semantics.md S15.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import attention_sink_gradient
      >>> attention_sink_gradient(jnp.zeros(2), jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))).tolist()
      [-3.0, -3.0]
    """
    empty = jnp.isneginf(lse)
    probability = jnp.exp(sinks.astype(lse.dtype)[..., None] - jnp.where(empty, jnp.inf, lse))
    gradient = -jnp.where(empty, 0, probability * delta).sum(-1)
    return (gradient.sum(0) if sinks.ndim == 1 else gradient).astype(sinks.dtype)


def attention_delta(dout: Array, out: Array, dlse: Array | None = None) -> Array:
    """What the backward of every part shares: rowsum(dO * O) - dLSE (S10).

    Args:
      dout: [b, sq, hq, dv], cotangent of the merged output.
      out: [b, sq, hq, dv], the merged output: of all keys, not of a part.
      dlse: [b, hq, sq], cotangent of the merged log-sum-exp, None for 0.

    Returns:
      [b, hq, sq] in float32, or float64 if `out` is.

    Source: Dao et al. 2022 (FlashAttention), appendix B.4.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import attention_delta
      >>> attention_delta(jnp.ones((1, 2, 1, 8)), jnp.full((1, 2, 1, 8), 0.5)).tolist()
      [[[4.0, 4.0]]]
    """
    # A cotangent of lse enters the score gradient P * (dP - delta) with the opposite sign.
    if dout.shape != out.shape:
        raise ValueError(f"dout and out must have one shape, got {dout.shape} and {out.shape}.")
    # XLA's CPU compiler (jaxlib 0.10) takes 30 times as long for a sum over the last axis alone.
    product = (_wide(dout) * _wide(out))[None]
    delta = jnp.sum(product, axis=(0, -1)).swapaxes(-1, -2)
    if dlse is None:
        return delta
    if dlse.shape != delta.shape:
        raise ValueError(f"dlse must have shape {delta.shape}, got {dlse.shape}.")
    return delta - dlse
