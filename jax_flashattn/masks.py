"""IntervalMask: a mask that says, for every query row, which run of keys it sees."""

import dataclasses

import jax
from jax import Array

from jax_flashattn import _mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntervalMask:
    """Row i sees the keys lo[i] <= j < hi[i].

    Every mask of flash attention has this form: causal, windows, padding, packed documents,
    prefixes, chunks. It is a pytree of two small arrays and may be traced. Values outside the keys
    are clamped; lo >= hi is a row that sees nothing (its output is 0).

    Args:
      lo: int32 [b, sq], or [1, sq] for every batch element.
      hi: int32, the shape of lo.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import IntervalMask
      >>> mask = IntervalMask(jnp.array([[0, 0, 2]]), jnp.array([[2, 2, 3]]))
      >>> mask.materialize(3)[0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    lo: Array
    hi: Array

    def __and__(self, other: "IntervalMask") -> "IntervalMask":
        """The keys visible in both masks; intervals are closed under intersection."""
        return IntervalMask(*_mask.intersect((self.lo, self.hi), (other.lo, other.hi)))

    def materialize(self, sk: int) -> Array:
        """The boolean matrix [b, sq, sk], for people and tests; costs O(sq sk)."""
        return _mask.visible(self.lo, self.hi, sk)
