"""How XLA may partition a call over batch and heads, without collectives and without Python.

A batch-partitionable FFI target may be split on leading dims that all its operands share. So a
call that may be partitioned is lowered with logical shapes that start with (b, g), g key heads:

  query, out, dout, dq   [b, g, r, s, d]   r query heads per key head
  key, value, dk, dv     [b, g, s, d]
  lse, delta             [b, g, r, s]
  lengths, lo, hi        [b, g, n]
  accumulators, counter, workspace  [b, g, ...] scratch

while layouts keep the bytes where they are, b, s, h, d: the transposes cost nothing on a GPU.
"""

import jax.numpy as jnp
from jax import Array

# name -> (Shardy factors, minor-to-major layout). Factors b and g are shared, all others whole.
_FORMS = {
    "query": ("b g r s d", (4, 2, 1, 3, 0)),
    "key": ("b g t d", (3, 1, 2, 0)),
    "value": ("b g t e", (3, 1, 2, 0)),
    "out": ("b g r s e", (4, 2, 1, 3, 0)),
    "statistic": ("b g r s", (3, 2, 1, 0)),
    "lengths": ("b g l", (2, 1, 0)),
    "lo": ("b g m", (2, 1, 0)),
    "hi": ("b g n", (2, 1, 0)),
    "accumulators": ("b g w x y", (4, 3, 2, 1, 0)),
    "counter": ("b g c", (2, 1, 0)),
    "workspace": ("b g z", (2, 1, 0)),
}
REPLICATED = tuple("rsdtelmnwxycz")

FORWARD = (("query", "key", "value", "lengths", "lo", "hi"), ("out", "statistic"))
BACKWARD = (
    (*FORWARD[0], "out", "statistic", "statistic"),
    ("query", "key", "value"),
)


def rule(operands: tuple[str, ...], results: tuple[str, ...]) -> str:
    """The Shardy rule of a call with these operands and results."""
    left, right = (", ".join(_FORMS[name][0] for name in names) for names in (operands, results))
    return f"{left} -> {right}"


def replicated_factors(text: str) -> tuple[str, ...]:
    """The factors of a rule that must not be sharded, in order of first appearance."""
    return tuple(f for f in dict.fromkeys(text.replace(",", " ").split()) if f in REPLICATED)


def layouts(names: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Minor-to-major layouts that leave the bytes in the user's order."""
    return [_FORMS[name][1] for name in names]


def to_logical(name: str, x: Array, g: int) -> Array:
    """One operand from the user's shape to the logical one."""
    if name in ("query", "out"):
        b, s, h, d = x.shape
        return x.reshape(b, s, g, h // max(g, 1), d).transpose(0, 2, 3, 1, 4)
    if name in ("key", "value"):
        return x.transpose(0, 2, 1, 3)
    if name == "statistic":
        b, h, s = x.shape
        return x.reshape(b, g, h // max(g, 1), s)
    return jnp.broadcast_to(x[:, None], (x.shape[0], g, x.shape[1]))


def from_logical(name: str, x: Array) -> Array:
    """One result from the logical shape to the user's."""
    if name in ("query", "out"):
        b, g, r, s, d = x.shape
        return x.transpose(0, 3, 1, 2, 4).reshape(b, s, g * r, d)
    if name in ("key", "value"):
        return x.transpose(0, 2, 1, 3)
    b, g, r, s = x.shape
    return x.reshape(b, g * r, s)
