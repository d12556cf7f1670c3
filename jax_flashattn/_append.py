"""Appending keys or values to a cache, in its own memory where XLA may overwrite it.

A cache is [blocks, size, ...]: with a table int32 [b, columns], position p of sequence n is
cache[table[n, p // size], p % size]; without one, cache[n, p]. What has no place is dropped.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _compat, _native
from jax_flashattn._compat import batching, mlir

append_p = _compat.make_primitive("flash_append")  # cache, new, start, table -> cache


@jax.custom_jvp
def append(cache: Array, new: Array, start: Array, table: Array | None) -> Array:
    """The cache with new [b, n, ...] at positions start [b], start + 1, ... of each sequence.

    XLA's own scatter copies a 16-bit cache on CPU (it widens it to float32 and back). This writes
    the new rows only, and the result is the operand's memory: a donated cache, or one carried by a
    loop, is not copied.
    """
    table = jnp.zeros((new.shape[0], 0), jnp.int32) if table is None else table
    (updated,) = append_p.bind(*_compat.match_varying([cache, new, start, table]))
    return updated


@append.defjvp
def _append_jvp(primals, tangents):
    cache, new, start, table = primals

    def scatter(cache, new):
        return append_by_scatter(cache, new, start, table)

    _, tangent = jax.jvp(scatter, (cache, new), tangents[:2])
    return append(*primals), tangent


def append_by_scatter(cache: Array, new: Array, start: Array, table: Array | None) -> Array:
    """The same in XLA's operations: differentiable, and partitioned like any of them."""
    b, n = new.shape[:2]
    size, row = cache.shape[1], jnp.arange(b)[:, None]
    position = start[:, None] + jnp.arange(n, dtype=jnp.int32)
    if table is None:
        at = (row, position)
    else:
        outside = cache.shape[0]
        block = table.at[row, position // size].get(mode="fill", fill_value=outside)
        at = (block, position % size)
    return cache.at[at].set(new, mode="drop", wrap_negative_indices=False)


@append_p.def_abstract_eval
def _abstract(*operands):
    cache = operands[0]
    result = (cache.shape, cache.dtype, _compat.axes_of(cache))
    return _compat.result_avals("flash_append", operands, [result])


def _batch(operands, dims):
    """One call: the mapped axis goes before the blocks, and each slice's ids are its own blocks."""
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    cache, new, start, table = (batching.bdim_at_front(x, d, size) for x, d in zip(operands, dims))
    blocks, b = cache.shape[1], new.shape[1]
    if table.shape[2] == 0:
        table = jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32)[:, None], (size, b, 1))
    first = jnp.arange(size, dtype=jnp.int32)[:, None, None] * blocks
    table = jnp.where((table >= 0) & (table < blocks), first + table, -1)
    folded = [x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (cache, new, start, table)]
    return [x.reshape(cache.shape) for x in append_p.bind(*folded)], [0]


batching.primitive_batchers[append_p] = _batch


def _lower(platform: str, ctx, *operands):
    if _compat.may_be_partitioned(ctx):

        def scatter(cache, new, start, table):
            return [append_by_scatter(cache, new, start, table if table.shape[1] else None)]

        return mlir.lower_fun(scatter, multiple_results=True)(ctx, *operands)
    _native.require(platform)
    return jax.ffi.ffi_lowering(_native.APPEND, operand_output_aliases={0: 0})(ctx, *operands)


mlir.register_lowering(append_p, lambda *x: _lower("cpu", *x), platform="cpu")
mlir.register_lowering(append_p, lambda *x: _lower("CUDA", *x), platform="cuda")
