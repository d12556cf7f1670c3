"""The arrays of one call: the one list of them, in the order that primitives and kernels know."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Operands(NamedTuple):
    """The arrays of one call, in the user's layout. Absent ones are None.

    Attributes:
      query: [b, sq, hq, d].
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv].
      lengths: int32 [b, 2], (query, key) lengths of an arithmetic mask.
      lo: int32 [b, sq], interval limits that already contain everything that hides keys.
      hi: int32 [b, sq].
      position: int32 [b, sq], the aligned key coordinate of each row, for ALiBi and dropout; None
        is i + sk - sq of the lengths.
      key_coordinates: int32 [b, 2], key j has coordinate start + stride * j; None is (0, 1).
      slopes: float32 [b, hq] (S9).
      sinks: float32, for float64 inputs float64, [b, hq] (S15).
      dropout: uint32 [b, hq, 4], key words, batch and head index (S12).
      bias: [b or 1, hq or 1, sq or 1, sk or 1], dtype of query or float32 (S8).
    """

    query: Array
    key: Array
    value: Array
    lengths: Array | None = None
    lo: Array | None = None
    hi: Array | None = None
    position: Array | None = None
    key_coordinates: Array | None = None
    slopes: Array | None = None
    sinks: Array | None = None
    dropout: Array | None = None
    bias: Array | None = None

    def flat(self) -> list[Array]:
        """All of them, an absent one as an array whose last dimension is 0."""
        absent = jnp.zeros((self.query.shape[0], 0), jnp.int32)
        return [absent if x is None else x for x in self]


def statistics_dtype(dtype) -> jnp.dtype:
    """float32, or float64 for float64 inputs: the type of lse, delta and everything summed."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_absent(x) -> bool:
    """Whether an array of Operands.flat() stands for None."""
    return x.shape[-1] == 0
