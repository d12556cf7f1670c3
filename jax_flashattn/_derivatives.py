"""What jax may do with the tangent primitive: transpose it, and drop what it cannot derive again.

flash_tangent is linear in dq, dk, dv, dbias and dsink. Its transposition is the backward pass, so
reverse mode works through it, with the same kernel as the custom_vjp.

No kernel has second derivatives. But jax asks for them also where their result is thrown away, as
in grad of a loss that puts jax.jvp under stop_gradient (mean flow, consistency models). So the
derivative of a tangent is a primitive of the right type, and an error only if something needs it.
"""

import functools

import jax.numpy as jnp

from jax_flashattn._compat import ad, make_primitive, match_varying, mlir
from jax_flashattn._operands import Operands, is_absent
from jax_flashattn._primitives import (
    flash_backward_p,
    flash_forward_p,
    flash_tangent_p,
    rows_abstract,
)
from jax_flashattn.partials import attention_delta

_FIRST_LINEAR = len(Operands._fields) + 2  # behind the operands, out and lse

# Tangents of query, key, value, out, lse, dq, dk, dv and dsink, as _partition.py calls them.
SECOND_DERIVATIVE = (
    ("query", "key", "value", "out", "statistic", "query", "key", "value", "statistic"),
    ("out", "statistic"),
)
second_derivative_p = make_primitive("flash_second_derivative")
second_derivative_p.def_abstract_eval(functools.partial(rows_abstract, "flash_second_derivative"))


def _no_kernel(*_, **__):
    raise NotImplementedError(
        "flash_attention's kernels have no such derivative. differentiation='reverse' has "
        "gradients; differentiation='forward' has gradients and tangents, but not tangents of "
        "gradients (Hessian-vector products) or derivatives of tangents. "
        "implementation='reference' has them all, in O(sq sk) memory."
    )


def _transpose_tangent(cotangents, *inputs, spec):
    """Cotangents of the linear inputs from those of dout and dlse."""
    dout, dlse = map(ad.instantiate_zeros, cotangents)
    *operands, out, lse = inputs[:_FIRST_LINEAR]
    delta = attention_delta(dout, out, dlse)
    given = match_varying([*operands, dout, lse, delta])
    gradients = flash_backward_p.bind(*given, spec=spec)
    dsink = jnp.where(jnp.isneginf(lse), 0, -delta)
    found = (*gradients, dsink)
    linear = inputs[_FIRST_LINEAR:]
    wanted = [ct if ad.is_undefined_primal(x) else None for ct, x in zip(found, linear)]
    return [None] * _FIRST_LINEAR + wanted


def _transpose_second(cotangents, *inputs, spec):
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [None] * len(inputs)
    _no_kernel()


def _tangent_jvp(primals, tangents, *, spec):
    """Linear in the tangents' tangents; else a second derivative."""
    results = flash_tangent_p.bind(*primals, spec=spec)
    fixed, linear = tangents[:_FIRST_LINEAR], tangents[_FIRST_LINEAR:]
    if all(type(t) is ad.Zero for t in fixed):
        moved = [
            x if is_absent(x) else ad.instantiate_zeros(t)
            for x, t in zip(primals[_FIRST_LINEAR:], linear)
        ]
        inputs = match_varying([*primals[:_FIRST_LINEAR], *moved])
        return results, flash_tangent_p.bind(*inputs, spec=spec)
    bias = len(SECOND_DERIVATIVE[0]) - 1
    moved = [*tangents[:3], *tangents[len(Operands._fields) :]]
    del moved[bias]
    moved = match_varying([ad.instantiate_zeros(t) for t in moved])
    return results, second_derivative_p.bind(*moved, spec=spec)


ad.primitive_transposes[flash_tangent_p] = _transpose_tangent
ad.primitive_transposes[second_derivative_p] = _transpose_second
ad.primitive_jvps[flash_tangent_p] = _tangent_jvp
for _primitive in (flash_forward_p, flash_backward_p, second_derivative_p):
    ad.primitive_jvps[_primitive] = _no_kernel
mlir.register_lowering(second_derivative_p, _no_kernel)
