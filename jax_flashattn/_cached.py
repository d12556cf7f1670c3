"""Attention over a cache of blocks: one primitive, two ways to compute it.

  CPU, few query rows     our kernel reads keys and values where they lie (csrc/cpu/cached.cc)
  everything else         what is not contiguous is gathered, then the general kernel

_reads_in_place is the one place that decides. Everything else is CUDA, a long q, and programs that
XLA may partition over devices (inside shard_map each device has a call of its own).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from jax_flashattn import _compat, _native, _pages
from jax_flashattn._attention import attention
from jax_flashattn._compat import batching, mlir
from jax_flashattn._operands import Operands, is_absent, statistics_dtype
from jax_flashattn._primitives import flash_forward, rows_abstract
from jax_flashattn._spec import AttentionSpec

MOST_PARTS = 128
# Query rows per key head up to which the kernel is the faster one even if nothing has to be
# gathered; rows of q up to which a gather is spared, at the end for a third more time.
_MOST_ROWS, _MOST_ROWS_OF_PAGES = 16, 64

flash_cached_p = _compat.make_primitive("flash_cached")  # *Operands, table -> out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cached_attention(
    operands: Operands, table: Array | None, spec: AttentionSpec, parts: int
) -> tuple[Array, Array]:
    """Output and lse; key and value are [blocks, size, hk, d], the table as in _append.py.

    Ids out of range are clamped. The gradient gathers, and is that of the general kernel.
    """
    table = jnp.zeros((operands.query.shape[0], 0), jnp.int32) if table is None else table
    inputs = _compat.match_varying([*operands.flat(), table])
    out, lse = flash_cached_p.bind(*inputs, spec=spec, parts=parts)
    return out, lse


def _forward(operands, table, spec, parts):
    return cached_attention(operands, table, spec, parts), (operands, table)


def _backward(spec, parts, residuals, cotangents):
    del parts
    operands, table = residuals
    _, vjp = jax.vjp(lambda x: attention(gathered(x, table), spec), operands)
    return *vjp(cotangents), None


cached_attention.defvjp(_forward, _backward)


def gathered(operands: Operands, table: Array | None) -> Operands:
    """The same with key and value [b, capacity, hk, d]: a copy, unless sequence n is block n."""
    b = operands.query.shape[0]

    def rows(x):
        return (x if x.shape[0] == b else x[:b]) if table is None else _pages.gather(x, table)

    return operands._replace(key=rows(operands.key), value=rows(operands.value))


def parts_of(b: int, sq: int, hq: int, capacity: int, hint: int) -> int:
    """Into how many parts the keys of a sequence are cut: by sizes, never by threads."""
    wanted_tasks, task_rows, least_keys = 128, 64, 256
    if hint == 0:
        hint = wanted_tasks // max(1, b * max(1, sq * hq // task_rows))
        hint = min(hint, -(-capacity // least_keys))
    return max(1, min(hint, MOST_PARTS))


def _reads_in_place(query, key, table) -> bool:
    """Whether the CPU kernel for few rows takes the call."""
    b, sq, hq, _ = query.shape
    contiguous = is_absent(table) and key.shape[0] == b
    rows = sq * hq // max(key.shape[2], 1)
    return rows <= _MOST_ROWS if contiguous else sq <= _MOST_ROWS_OF_PAGES


@flash_cached_p.def_abstract_eval
def _abstract(*operands, spec, parts):
    del parts
    return rows_abstract("flash_cached", *operands, spec=spec)


def _general(*operands, spec):
    *given, table = operands
    return flash_forward(gathered(Operands(*given), None if is_absent(table) else table), spec)


def _lower_cpu(ctx, *operands, spec, parts):
    query, key, value, *_, table = ctx.avals_in
    if _compat.may_be_partitioned(ctx) or not _reads_in_place(query, key, table):
        return _lower_general(ctx, *operands, spec=spec, parts=parts)
    _native.require("cpu")
    b, sq, hq, _ = query.shape
    shape = (b, parts, hq * sq, -(-value.shape[3] // 32) * 32 + 2)  # csrc/ffi/cpu_module.cc
    scratch = ShapeDtypeStruct(shape, statistics_dtype(query.dtype))
    avals_out = [*ctx.avals_out, _compat.ShapedArray(scratch.shape, scratch.dtype)]
    call = jax.ffi.ffi_lowering(_native.CACHED)
    return call(ctx.replace(avals_out=avals_out), *operands, **spec.attributes())[:2]


def _lower_general(ctx, *operands, spec, parts):
    del parts
    rule = mlir.lower_fun(functools.partial(_general, spec=spec), multiple_results=True)
    return rule(ctx, *operands)


mlir.register_lowering(flash_cached_p, _lower_cpu, platform="cpu")
mlir.register_lowering(flash_cached_p, _lower_general, platform="cuda")


def _batch(operands, dims, *, spec, parts):
    """One call of all slices' sequences; a cache that they share is not copied for each."""
    *given, table = operands
    *given_dims, table_dim = dims
    size = next(x.shape[d] for x, d in zip(operands, dims) if d is not None)
    front = [batching.bdim_at_front(x, d, size) for x, d in zip(given, given_dims)]
    b, blocks = front[0].shape[1], front[1].shape[1]
    cache_dims = given_dims[1:3]
    shared = cache_dims == [None, None]
    table = batching.bdim_at_front(table, table_dim, size)
    if is_absent(table) and (shared or blocks != b):
        table = jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32)[:, None], (size, b, 1))
    if not shared and not is_absent(table):
        first = jnp.arange(size, dtype=jnp.int32)[:, None, None] * blocks
        table = first + jnp.clip(table, 0, blocks - 1)
    folded = [x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (*front, table)]
    if shared:
        folded[1:3] = given[1:3]
    results = flash_cached_p.bind(*folded, spec=spec, parts=parts)
    return [x.reshape(size, b, *x.shape[1:]) for x in results], [0, 0]


batching.primitive_batchers[flash_cached_p] = _batch
