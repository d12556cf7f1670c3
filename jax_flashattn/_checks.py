"""Checks of one argument at a time, for prepare() and for the constructors of IntervalMask."""

import math
import operator
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


def check_window(window: Any) -> tuple[int | None, int | None]:
    """(left, right) with None for an unbounded side."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(
            "window must be None or a pair (left, right) of how many earlier and later keys a row "
            f"sees, None for all; got {window!r}."
        )
    return _check_side("left", window[0]), _check_side("right", window[1])


def _check_side(name: str, side: Any) -> int | None:
    if side is None:
        return None
    try:
        value = operator.index(side)
    except TypeError:
        raise TypeError(f"window {name} must be a Python int or None, got {side!r}.") from None
    if isinstance(side, bool) or value < 0:
        raise ValueError(f"window {name} must be 0 or more, or None for unbounded; got {side!r}.")
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


def check_size(name: str, size: Any, least: int = 0) -> int:
    """A Python int of at least `least`."""
    try:
        value = operator.index(size)
    except TypeError:
        raise TypeError(f"{name} must be a Python int, got {size!r}.") from None
    if isinstance(size, bool) or value < least:
        raise ValueError(f"{name} must be {least} or more, got {size!r}.")
    return value
