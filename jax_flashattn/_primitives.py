"""The two primitives, in the user's layout.

  flash_forward   query, key, value, lengths, lo, hi                     -> out, lse
  flash_backward  query, key, value, lengths, lo, hi, dout, lse, delta   -> dq, dk, dv

query, out, dout, dq [b, sq, hq, d or dv]; key, value, dk, dv [b, sk, hk, d or dv]; lse, delta
[b, hq, sq]; lengths int32 [b, 2], lo and hi int32 [b, sq]. An absent lengths, lo or hi has last
dimension 0, so that every operand starts with the batch and the call has one signature.
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
    b, sq, hq, _ = query.shape
    results = [
        ((b, sq, hq, value.shape[3]), query.dtype),
        ((b, hq, sq), statistics_dtype(query.dtype)),
    ]
    return _compat.result_avals("flash_forward", operands, results)


@flash_backward_p.def_abstract_eval
def _backward_abstract(*operands, spec):
    del spec
    results = [(x.shape, x.dtype) for x in operands[:3]]
    return _compat.result_avals("flash_backward", operands, results)


def _inputs(operands: Operands) -> list[Array]:
    absent = jnp.zeros((operands.query.shape[0], 0), jnp.int32)
    return [absent if x is None else x for x in operands]


def flash_forward(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and lse [b, hq, sq]."""
    inputs = _compat.match_varying(_inputs(operands))
    out, lse = flash_forward_p.bind(*inputs, spec=spec)
    return out, lse


def flash_backward(
    operands: Operands, dout: Array, lse: Array, delta: Array, spec: AttentionSpec
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value from the rows' lse and delta."""
    inputs = _compat.match_varying([*_inputs(operands), dout, lse, delta])
    dq, dk, dv = flash_backward_p.bind(*inputs, spec=spec)
    return dq, dk, dv
