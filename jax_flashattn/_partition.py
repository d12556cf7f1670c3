"""How XLA may partition a call over batch and heads, without collectives and without Python.

A batch-partitionable FFI target may be split on leading dims that all its operands share. So a
call that may be partitioned is lowered with logical shapes that start with (b, g), g key heads:

  query, out, dout, dq     [b, g, r, s, d]   r query heads per key head
  key, value, dk, dv       [b, g, s, d]
  lse, delta               [b, g, r, s]
  lengths, key_coordinates [b, g, 2]
  lo, hi, position         [b, g, s]
  slopes, sinks            [b, g, r]
  dropout                  [b, g, r, 4]
  bias, dbias              [b, g, r or 1, s or 1, t or 1]
  what is absent           [b, g, 0]
  accumulators, counter, workspace  [b, g, ...] scratch

while layouts keep the bytes where they are, b, s, h, d: the transposes cost nothing on a GPU. A
bias with 1 for b or hq cannot be split with the rest: here, and only here, it is repeated along
them, and its gradient summed afterwards.
"""

import jax.numpy as jnp
from jax import Array

from jax_flashattn._operands import Operands, is_absent, statistics_dtype

# name -> (Shardy factors, minor-to-major layout). Factors b and g are shared, all others whole.
_FORMS = {
    "query": ("b g r s d", (4, 2, 1, 3, 0)),
    "key": ("b g t d", (3, 1, 2, 0)),
    "value": ("b g t e", (3, 1, 2, 0)),
    "out": ("b g r s e", (4, 2, 1, 3, 0)),
    "statistic": ("b g r s", (3, 2, 1, 0)),
    "lengths": ("b g l", (2, 1, 0)),
    "key_coordinates": ("b g l", (2, 1, 0)),
    "lo": ("b g s", (2, 1, 0)),
    "hi": ("b g s", (2, 1, 0)),
    "position": ("b g s", (2, 1, 0)),
    "slopes": ("b g r", (2, 1, 0)),
    "sinks": ("b g r", (2, 1, 0)),
    "dropout": ("b g r k", (3, 2, 1, 0)),
    "bias": ("b g u v z", (4, 3, 2, 1, 0)),
    "absent": ("b g n", (2, 1, 0)),
    "accumulators": ("b g w x y", (4, 3, 2, 1, 0)),
    "counter": ("b g c", (2, 1, 0)),
    "workspace": ("b g m", (2, 1, 0)),
}
REPLICATED = tuple("rsdtelnkuvzwxycm")

FORWARD = (Operands._fields, ("out", "statistic"))
BACKWARD = (
    (*Operands._fields, "out", "statistic", "statistic"),
    ("query", "key", "value", "bias"),
)
TANGENT = (
    (*Operands._fields, "out", "statistic", "query", "key", "value", "bias", "statistic"),
    ("out", "statistic"),
)


def present(names: tuple[str, ...], avals) -> tuple[str, ...]:
    """The names, with "absent" for optional arrays that are."""
    optional = set(Operands._field_defaults)
    return tuple("absent" if n in optional and is_absent(x) else n for n, x in zip(names, avals))


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


def to_logical(name: str, x: Array, b: int, g: int) -> Array:
    """One operand from the user's shape to the logical one, of b batches and g key heads."""
    if name in ("query", "out"):
        _, s, h, d = x.shape
        return x.reshape(b, s, g, h // max(g, 1), d).transpose(0, 2, 3, 1, 4)
    if name in ("key", "value"):
        return x.transpose(0, 2, 1, 3)
    if name in ("statistic", "slopes", "sinks", "dropout"):
        h = x.shape[1]
        return x.reshape(b, g, h // max(g, 1), *x.shape[2:])
    if name == "bias":
        h, *pair = x.shape[1:]
        x = x[:, None] if h == 1 else x.reshape(x.shape[0], g, h // max(g, 1), *pair)
        return jnp.broadcast_to(x, (b, g, *x.shape[2:]))
    return jnp.broadcast_to(x[:, None], (b, g, x.shape[1]))


def from_logical(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """One result from the logical shape to the user's."""
    if name in ("query", "out"):
        return x.transpose(0, 3, 1, 2, 4).reshape(shape)
    if name in ("key", "value"):
        return x.transpose(0, 2, 1, 3)
    if name == "bias":
        x = summed(x, 0) if shape[0] == 1 else x
        x = summed(x, 1) if shape[1] == 1 else x
    if name == "absent":
        x = x[:, 0]
    return x.reshape(shape)


def summed(x: Array, axis: int) -> Array:
    """The sum over an axis that stays, in float32 at least."""
    return x.sum(axis, keepdims=True, dtype=statistics_dtype(x.dtype)).astype(x.dtype)
