"""The two primitives, and the bridge from the user's layout to theirs.

Primitives see logical operands whose leading dims (b, g) every operand shares, which is what lets
XLA partition and batch them without a copy; memory stays b, s, h, d (jax_flashattn/_lowering.py):

  query, out, their gradients   [b, g, r, sq, d or dv]   g key heads, r query heads per key head
  key, value, their gradients   [b, g, sk, d or dv]
  lse, delta                    [b, g, r, sq]
  lengths [b, 1, 2], lo and hi [b, 1, sq], all int32; an absent one has last dimension 0
"""

import jax.numpy as jnp
from jax import Array

from jax_flashattn import _compat
from jax_flashattn._spec import AttentionSpec
from jax_flashattn._validate import Operands

flash_forward_p = _compat.make_primitive("flash_forward")
flash_backward_p = _compat.make_primitive("flash_backward")


def statistics_dtype(dtype) -> jnp.dtype:
    """float32, or float64 for float64 inputs: the type of lse, delta and accumulators."""
    return jnp.promote_types(dtype, jnp.float32)


@flash_forward_p.def_abstract_eval
def _forward_abstract(*operands, spec):
    del spec
    query, _, value = operands[:3]
    *rows, _ = query.shape
    return _compat.result_avals(
        "flash_forward",
        operands,
        [((*rows, value.shape[-1]), query.dtype), (tuple(rows), statistics_dtype(query.dtype))],
    )


@flash_backward_p.def_abstract_eval
def _backward_abstract(*operands, spec):
    del spec
    return _compat.result_avals(
        "flash_backward", operands, [(x.shape, x.dtype) for x in operands[:3]]
    )


def _split_heads(x: Array, g: int) -> Array:
    """[b, s, h, d] to [b, g, r, s, d]."""
    b, s, h, d = x.shape
    return x.reshape(b, s, g, h // max(g, 1), d).transpose(0, 2, 3, 1, 4)


def _join_heads(x: Array) -> Array:
    """[b, g, r, s, d] to [b, s, h, d]."""
    b, g, r, s, d = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, s, g * r, d)


def _logical(operands: Operands) -> list[Array]:
    b, _, g, _ = operands.key.shape
    absent = jnp.zeros((b, 1, 0), jnp.int32)
    mask = [
        absent if x is None else x[:, None]
        for x in (operands.lengths, operands.lo, operands.hi)
    ]
    return [
        _split_heads(operands.query, g),
        operands.key.transpose(0, 2, 1, 3),
        operands.value.transpose(0, 2, 1, 3),
        *mask,
    ]


def flash_forward(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and lse [b, hq, sq]."""
    b, sq, hq, _ = operands.query.shape
    inputs = _compat.match_varying(_logical(operands))
    out, lse = flash_forward_p.bind(*inputs, spec=spec)
    return _join_heads(out), lse.reshape(b, hq, sq)


def flash_backward(
    operands: Operands, dout: Array, lse: Array, delta: Array, spec: AttentionSpec
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value from lse and delta [b, hq, sq] and dout [b, sq, hq, dv]."""
    b, sq, hq, _ = operands.query.shape
    g = operands.key.shape[2]
    rows = (b, g, hq // max(g, 1), sq)
    inputs = [*_logical(operands), _split_heads(dout, g), lse.reshape(rows), delta.reshape(rows)]
    dq, dk, dv = flash_backward_p.bind(*_compat.match_varying(inputs), spec=spec)
    return _join_heads(dq), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
