"""Checks of softcap, ALiBi slopes, sinks, dropout and bias: user arguments to operands."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jax_flashattn import _dropout
from jax_flashattn._checks import as_array, check_int32, check_number
from jax_flashattn._operands import statistics_dtype


def check_softcap(softcap: Any) -> float:
    """The cap, 0 for none."""
    if softcap is None:
        return 0.0
    value = check_number(softcap, "softcap", "it is compiled in")
    if value < 0:
        raise ValueError(f"softcap must be 0 (off) or positive, got {value}.")
    return value


def _check_heads(x: Any, name: str, dtypes: tuple[str, ...], shapes: tuple) -> Array:
    x = as_array(x, name)
    if str(x.dtype) not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(dtypes)}, got {x.dtype}.")
    if x.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {x.shape}.")
    return x


def check_slopes(slopes: Any, b: int, hq: int) -> Array | None:
    """[hq] or [b, hq] as float32 [b, hq], without a gradient."""
    if slopes is None:
        return None
    slopes = _check_heads(slopes, "alibi_slopes", ("float32",), ((hq,), (b, hq)))
    return jax.lax.stop_gradient(jnp.broadcast_to(slopes, (b, hq)))


def check_sinks(sinks: Any, query: Array) -> Array | None:
    """[hq] as [b, hq] in the dtype of lse; its gradient sums over b again."""
    if sinks is None:
        return None
    b, _, hq, _ = query.shape
    dtypes = tuple(dict.fromkeys(("float32", str(query.dtype))))
    sinks = _check_heads(sinks, "sinks", dtypes, ((hq,),))
    wide = statistics_dtype(query.dtype)
    return jnp.broadcast_to(sinks.astype(wide), (b, hq))


def check_bias(bias: Any, query: Array, sk: int) -> Array | None:
    """[b or 1, hq or 1, sq or 1, sk or 1] in the dtype of query or float32."""
    if bias is None:
        return None
    b, sq, hq, _ = query.shape
    bias = as_array(bias, "bias")
    dtypes = dict.fromkeys((str(query.dtype), "float32"))
    if str(bias.dtype) not in dtypes:
        raise TypeError(f"bias must have dtype {' or '.join(dtypes)}, got {bias.dtype}.")
    full = (b, hq, sq, sk)
    if bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, full)):
        raise ValueError(
            f"bias must have shape [b, hq, sq, sk] = {full} or 1 on any axis, got {bias.shape}."
        )
    return bias


def check_dropout(rate: Any, key: Any, b: int, hq: int) -> tuple[int, Array | None]:
    """Keep threshold of 65536, and the streams [b, hq, 4] unless everything is kept."""
    if isinstance(rate, (Tracer, bool)) or not isinstance(rate, (int, float, np.number)):
        raise TypeError(f"dropout_rate must be a Python number, got {rate!r}.")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout_rate must be between 0 and 1, got {rate}.")
    if rate > 0 and key is None:
        raise ValueError(f"dropout_rate {rate} needs a dropout_key (a jax.random key).")
    words = None if key is None else key_words(key)
    threshold = _dropout.keep_threshold(float(rate))
    if words is None or threshold == _dropout.KEEP_ALL:
        return _dropout.KEEP_ALL, None
    return threshold, _dropout.streams(_dropout.fold_key(words), b, hq)


def check_positions(positions: Any, b: int, sq: int) -> Array | None:
    """The rows' aligned key coordinates, int32 [b, sq]."""
    return None if positions is None else check_int32(positions, "query_positions", (b, sq))


def check_coordinates(coordinates: Any, b: int) -> Array | None:
    """A pair (start, stride) of int32 scalars or int32 [b, 2], as int32 [b, 2]."""
    if coordinates is None:
        return None
    if not isinstance(coordinates, tuple):
        return check_int32(coordinates, "key_coordinates", (b, 2))
    if len(coordinates) != 2:
        raise ValueError(
            f"key_coordinates must be a pair (start, stride) or int32 [b, 2], got {coordinates!r}."
        )
    pair = [
        check_int32(
            np.asarray(x) if isinstance(x, (int, np.integer)) else x, f"key_coordinates {name}", ()
        )
        for name, x in zip(("start", "stride"), coordinates)
    ]
    return jnp.broadcast_to(jnp.stack(pair), (b, 2))


def key_words(key: Any) -> Array:
    """The words of one key, new-style or raw."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise TypeError(f"dropout_key must be a jax.random key, got {type(key).__name__}.")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise ValueError(f"dropout_key must be one key, got keys of shape {key.shape}.")
        return jax.random.key_data(key).astype(jnp.uint32)
    if key.dtype != jnp.uint32:
        raise TypeError(
            f"dropout_key must be a jax.random key or its uint32 words, got dtype {key.dtype}."
        )
    if key.ndim != 1 or key.size not in (2, 4):
        raise ValueError(f"dropout_key must have shape (2,) or (4,) as words, got {key.shape}.")
    return jnp.asarray(key)
