"""One differentiable attention call over the primitives, for either mode of differentiation."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jax_flashattn import _compat
from jax_flashattn._operands import Operands
from jax_flashattn._primitives import flash_backward, flash_forward, flash_tangent
from jax_flashattn._spec import AttentionSpec
from jax_flashattn.partials import attention_delta, attention_sink_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attention(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """Output [b, sq, hq, dv] and log-sum-exp [b, hq, sq] by the kernels."""
    return flash_forward(operands, spec)


def _named(out: Array, lse: Array) -> tuple[Array, Array]:
    """Under jax.checkpoint a policy that saves these names does not run the kernel again."""
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def _attention_forward(operands: Operands, spec: AttentionSpec):
    out, lse = _named(*flash_forward(operands, spec))
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


def _sink_probability(sinks, lse):
    """S15: how much of each row's softmax its sink takes; nothing of a row that sees nothing."""
    return jnp.exp(sinks[:, :, None] - jnp.where(jnp.isneginf(lse), jnp.inf, lse))


attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def forward_attention(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    """attention with tangents by a kernel of their own; _derivatives.py transposes it."""
    return flash_forward(operands, spec)


@forward_attention.defjvp
def _attention_tangent(spec: AttentionSpec, primals, tangents):
    (operands,), (moved,) = primals, tangents
    out, lse = _named(*forward_attention(operands, spec))
    dsink = jnp.zeros_like(lse)
    if operands.sinks is not None:
        dsink = _sink_probability(operands.sinks, lse) * moved.sinks[:, :, None]
    return (out, lse), flash_tangent(operands, out, lse, moved, dsink, spec)
