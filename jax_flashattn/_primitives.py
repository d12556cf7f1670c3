"""The three primitives, in the user's layout.

  flash_forward   *Operands                                     -> out, lse
  flash_backward  *Operands, dout, lse, delta                   -> dq, dk, dv, dbias
  flash_tangent   *Operands, out, lse, dq, dk, dv, dbias, dsink -> dout, dlse

A d is a cotangent for flash_backward and a tangent for flash_tangent.
Operands are all of Operands.flat(), so the call has one signature; absent ones have last dimension
0. out and dout are [b, sq, hq, dv]; lse, delta, dsink and dlse [b, hq, sq].
"""

import functools

from jax import Array

from jax_flashattn import _compat
from jax_flashattn._operands import Operands, statistics_dtype
from jax_flashattn._spec import AttentionSpec

flash_forward_p = _compat.make_primitive("flash_forward")
flash_backward_p = _compat.make_primitive("flash_backward")
flash_tangent_p = _compat.make_primitive("flash_tangent")


def rows_abstract(name: str, *operands, spec):
    """Types of what has one vector and one number for each row: out and lse, or their tangents."""
    del spec
    query, _, value = operands[:3]
    b, sq, hq, _ = query.shape
    on_b, on_s, on_h, _ = _compat.axes_of(query)  # in explicit sharding mode they lie as rows do
    results = [
        ((b, sq, hq, value.shape[3]), query.dtype, (on_b, on_s, on_h, None)),
        ((b, hq, sq), statistics_dtype(query.dtype), (on_b, on_h, on_s)),
    ]
    return _compat.result_avals(name, operands, results)


for _primitive in (flash_forward_p, flash_tangent_p):
    _primitive.def_abstract_eval(functools.partial(rows_abstract, _primitive.name))


@flash_backward_p.def_abstract_eval
def _backward_abstract(*operands, spec):
    del spec
    given = dict(zip(Operands._fields, operands))  # dout, lse and delta follow
    primals = [given[n] for n in ("query", "key", "value", "bias")]
    results = [(x.shape, x.dtype, _compat.axes_of(x)) for x in primals]
    return _compat.result_avals("flash_backward", operands, results)


def flash_forward(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and lse [b, hq, sq]."""
    inputs = _compat.match_varying(operands.flat())
    out, lse = flash_forward_p.bind(*inputs, spec=spec)
    return out, lse


def flash_backward(
    operands: Operands, dout: Array, lse: Array, delta: Array, spec: AttentionSpec
) -> tuple[Array, Array, Array, Array]:
    """Gradients of query, key, value and bias from the rows' lse and delta."""
    given = operands._replace(sinks=None)  # they are in lse
    inputs = _compat.match_varying([*given.flat(), dout, lse, delta])
    dq, dk, dv, dbias = flash_backward_p.bind(*inputs, spec=spec)
    return dq, dk, dv, dbias


def flash_tangent(
    operands: Operands,
    out: Array,
    lse: Array,
    tangents: Operands,
    dsink: Array,
    spec: AttentionSpec,
) -> tuple[Array, Array]:
    """Tangents of output and lse; dsink is what the tangents of the sinks add to that of lse."""
    given = operands._replace(sinks=None)  # they are in lse and dsink
    dq, dk, dv, *_, dbias = tangents.flat()
    inputs = _compat.match_varying([*given.flat(), out, lse, dq, dk, dv, dbias, dsink])
    dout, dlse = flash_tangent_p.bind(*inputs, spec=spec)
    return dout, dlse
