"""vmap: the mapped axis becomes the minor part of the batch, so a batch sharding survives it."""

import functools

import jax.numpy as jnp

from jax_flashattn import _partition
from jax_flashattn._compat import batching
from jax_flashattn._derivatives import SECOND_DERIVATIVE, second_derivative_p
from jax_flashattn._operands import is_absent
from jax_flashattn._primitives import flash_backward_p, flash_forward_p, flash_tangent_p


def _batch(primitive, names, operands, dims, *, spec):
    operand_names, result_names = names
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    b = next(x.shape[0 if d is None else (1 if d == 0 else 0)] for x, d in zip(operands, dims))

    def fold(x, dim):
        """The mapped axis behind b, then both in one; a bias may have 1 for b."""
        x = x[:, None] if dim is None else jnp.moveaxis(x, dim, 1)
        return jnp.broadcast_to(x, (b, size, *x.shape[2:])).reshape(b * size, *x.shape[2:])

    # Only a gradient, or a tangent of its own, needs the slices of a shared bias apart.
    biases = [(x, d) for name, x, d in zip(operand_names, operands, dims) if name == "bias"]
    whole = "bias" not in result_names and all(d is None and x.shape[0] == 1 for x, d in biases)
    folded = [
        x if name == "bias" and whole else fold(x, dim)
        for name, x, dim in zip(operand_names, operands, dims)
    ]
    results = primitive.bind(*folded, spec=spec)
    results = [x.reshape(b, size, *x.shape[1:]) for x in results]
    if "bias" in result_names:
        at = operand_names.index("bias")
        bias, dim = operands[at], dims[at]
        shared = bias.shape[1 if dim == 0 else 0] == 1 and not is_absent(bias)
        if shared:
            at = result_names.index("bias")
            results[at] = _partition.summed(results[at], 0)
    return results, [1] * len(results)


for _primitive, _names in (
    (flash_forward_p, _partition.FORWARD),
    (flash_backward_p, _partition.BACKWARD),
    (flash_tangent_p, _partition.TANGENT),
    (second_derivative_p, SECOND_DERIVATIVE),
):
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive, _names)
