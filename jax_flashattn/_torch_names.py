"""flash-attn's names for arguments and results, and ours for the same."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn.api import flash_attention

MOST_PROBABILITY_BYTES = 2**30
_CHUNK = 256  # keys whose probabilities one call reads: the widest value


def native_options(
    *,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Array | None,
    deterministic: bool,
    dropout_key: Any,
    learnable_sink: Array | None,
    implementation: str | None,
) -> dict[str, Any]:
    """Arguments of flash_attention from those of flash-attn."""
    if not isinstance(softcap, (int, float, np.number)) or not softcap >= 0:
        raise ValueError(f"softcap must be a number, 0 (off) or more, got {softcap!r}.")
    options: dict[str, Any] = {
        "causal": causal,
        "window": native_window(window_size),
        "scale": softmax_scale,
        "softcap": float(softcap) or None,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "dropout_rate": dropout_p,
        "dropout_key": dropout_key,
        "sinks": learnable_sink,
        "implementation": implementation,
    }
    return options


def native_window(window_size: Any) -> tuple[int | None, int | None]:
    """(left, right) with None for what flash-attn writes as -1 or None."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(
            "window_size must be a pair (left, right), -1 or None for an unbounded side; got "
            f"{window_size!r}."
        )
    left, right = (_native_side(side, window_size) for side in window_size)
    return left, right


def _native_side(side: Any, window_size: Any) -> int | None:
    if side is None:
        return None
    value = as_int(side, "a side of window_size")
    if value < -1:
        raise ValueError(
            f"a side of window_size must be 0 or more, or -1 or None for unbounded; got "
            f"{window_size!r}."
        )
    return None if value == -1 else value


def as_int(x: Any, name: str) -> int:
    """A Python int known at trace time."""
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be a Python int, got {type(x).__name__}.") from None


def unpack(packed: Array, count: int, ndim: int, name: str) -> list[Array]:
    """The `count` arrays that an array of `ndim` dimensions holds along its third-last axis."""
    shape = packed.shape
    if len(shape) != ndim or shape[-3] != count:
        lead = "batch, seqlen" if ndim == 5 else "total"
        raise ValueError(
            f"{name} must have shape [{lead}, {count}, heads, head_dim], got {tuple(shape)}."
        )
    return [packed[..., n, :, :] for n in range(count)]


def check_probability_bytes(shape: tuple[int, ...], dtype: Any) -> None:
    """S_dmask is for tests: it has a number for every pair of a query and a key."""
    size = int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
    if size > MOST_PROBABILITY_BYTES:
        raise ValueError(
            f"return_attn_probs would allocate {size / 2**30:.1f} GB for S_dmask of shape {shape}; "
            f"at most {MOST_PROBABILITY_BYTES >> 30} GB is allowed. It is meant for tests; for "
            "softmax_lse alone use flash_attention(..., return_lse=True)."
        )


def signed_probabilities(query: Array, key: Array, options: dict[str, Any]) -> Array:
    """S_dmask [b, hq, sq, sk]: probabilities before dropout, negative where dropped.

    They are read from the kernel itself: with the identity as values the output is the matrix of
    probabilities, and a dropped one is 0.
    """
    b, sk, hk, _ = key.shape
    check_probability_bytes((b, query.shape[2], query.shape[1], sk), query.dtype)
    no_dropout = options | {"dropout_rate": 0.0, "dropout_key": None}
    columns = []
    for start in range(0, sk, _CHUNK):
        width = min(_CHUNK, sk - start)
        unit = jnp.eye(sk, width, k=-start, dtype=query.dtype)[None, :, None]
        unit = jnp.broadcast_to(unit, (b, sk, hk, width))
        kept = flash_attention(query, key, unit, **options)
        whole = flash_attention(query, key, unit, **no_dropout)
        columns.append(jnp.where(kept == 0, -whole, whole))
    if not columns:
        return jnp.zeros((b, query.shape[2], query.shape[1], 0), query.dtype)
    return jax.lax.stop_gradient(jnp.concatenate(columns, axis=-1).swapaxes(1, 2))
