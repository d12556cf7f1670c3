"""Checks of what index arrays hold: where values are known, an error; where traced, clamping.

A traced value cannot raise while a program is traced. Code that uses it clamps it, so nothing is
read or written outside an array; JAX_FLASHATTN_CHECK_VALUES=1, read as a program is traced, makes
the compiled program check it as well and fail with the same message.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.core import Tracer

_FLAG = "JAX_FLASHATTN_CHECK_VALUES"


def known(*arrays) -> bool:
    """Whether Python can look at the values now."""
    return not any(
        isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable)
        for x in arrays
    )


def check(checker: Callable[..., None], *arrays) -> None:
    """Calls checker(*numpy arrays), which raises ValueError, now or, if asked to, at run time."""
    if known(*arrays):
        checker(*map(np.asarray, arrays))
    elif os.environ.get(_FLAG) == "1":
        jax.debug.callback(lambda *values: checker(*map(np.asarray, values)), *arrays)


def check_cu_seqlens(cu_seqlens, total: int, name: str) -> None:
    """Cumulative lengths: from 0, never decreasing, at most the number of tokens."""

    def checker(values):
        if values[0] != 0:
            raise ValueError(f"{name} must start at 0, got {values[0]}.")
        falls = np.flatnonzero(np.diff(values) < 0)
        if falls.size:
            at = falls[0]
            raise ValueError(
                f"{name} must not decrease, got {values[at]} followed by {values[at + 1]} at "
                f"index {at + 1}."
            )
        if values[-1] > total:
            raise ValueError(f"{name} ends at {values[-1]}, but the array has {total} tokens.")

    check(checker, cu_seqlens)


def check_range(values, low: int, high: int, name: str) -> None:
    """Every value is low to high, both included."""

    def checker(values):
        if values.size and (values.min() < low or values.max() > high):
            raise ValueError(
                f"{name} must be {low} to {high}, got {values.min()} to {values.max()}."
            )

    check(checker, values)
