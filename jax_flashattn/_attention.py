"""One differentiable attention call over the two primitives."""

import functools

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jax_flashattn import _compat
from jax_flashattn._operands import Operands
from jax_flashattn._primitives import flash_backward, flash_forward
from jax_flashattn._spec import AttentionSpec
from jax_flashattn.partials import attention_delta, attention_sink_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attention(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and log-sum-exp [b, hq, sq] by the kernels."""
    return flash_forward(operands, spec)


def _attention_forward(operands: Operands, spec: AttentionSpec):
    out, lse = flash_forward(operands, spec)
    # Under jax.checkpoint a policy that saves these names does not run the kernel again.
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return (out, lse), (operands, out, lse)


def _attention_backward(spec: AttentionSpec, residuals, cotangents):
    operands, out, lse = residuals
    dout, dlse = cotangents
    delta = attention_delta(dout, out, dlse)
    dq, dk, dv, dbias = flash_backward(operands, dout, lse, delta, spec)
    gradients = Operands(dq, dk, dv)  # None is zero
    if operands.bias is not None:
        gradients = gradients._replace(bias=dbias)
    if operands.sinks is not None:
        gradients = gradients._replace(sinks=attention_sink_gradient(operands.sinks, lse, delta))
    matched = [
        None if ct is None else _compat.match_cotangent(ct, x) for ct, x in zip(gradients, operands)
    ]
    return (Operands._make(matched),)


attention.defvjp(_attention_forward, _attention_backward)
