"""vmap: the mapped axis becomes the minor part of the batch, so a batch sharding survives it."""

import functools

import jax.numpy as jnp

from jax_flashattn._compat import batching
from jax_flashattn._primitives import flash_backward_p, flash_forward_p


def _batch(primitive, operands, dims, *, spec):
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    b = next(x.shape[0 if d is None else (1 if d == 0 else 0)] for x, d in zip(operands, dims))

    def fold(x, dim):
        """The mapped axis behind b, then both in one."""
        if dim is None:
            x = jnp.broadcast_to(x[:, None], (b, size, *x.shape[1:]))
        else:
            x = jnp.moveaxis(x, dim, 1)
        return x.reshape(b * size, *x.shape[2:])

    results = primitive.bind(*map(fold, operands, dims), spec=spec)
    results = [x.reshape(b, size, *x.shape[1:]) for x in results]
    return results, [1] * len(results)


for _primitive in (flash_forward_p, flash_backward_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)
