"""Checks that several arguments share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


def as_array(x: Any, name: str) -> Array:
    """A jax array from a jax or numpy array."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    return jnp.asarray(x)


def check_number(x: Any, name: str, instead: str) -> float:
    """A finite number that is known at trace time; `instead` says what to do with a traced one."""
    known = isinstance(x, (int, float, np.number, np.ndarray, jax.Array))
    if isinstance(x, (Tracer, bool)) or not known:
        raise TypeError(f"{name} must be a number known at trace time, got {x!r}; {instead}.")
    value = float(x)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return value


def check_int32(x: Any, name: str, shape: tuple[int, ...]) -> Array:
    """An int32 array of exactly this shape."""
    if isinstance(x, (list, tuple)):
        x = np.asarray(x)
    if isinstance(x, np.ndarray) and x.dtype == np.int64:  # numpy's default integer
        if x.size and (x.min() < -(2**31) or x.max() >= 2**31):
            raise ValueError(f"{name} must fit int32, got values {x.min()} to {x.max()}.")
        x = x.astype(np.int32)
    x = as_array(x, name)
    if x.dtype != jnp.int32:
        raise TypeError(f"{name} must have dtype int32, got {x.dtype}.")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {x.shape}.")
    return x
