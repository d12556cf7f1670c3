"""Lowering of the primitives to FFI custom calls: attributes, scratch, and two forms of one call.

On one device, or inside a fully manual shard_map, the call takes the user's arrays as they are.
Where XLA may partition it, it takes the logical form of _partition.py. The bytes are the same, and
csrc/ffi/decode.cc tells the forms apart by rank. No GPU is queried here, so a program for CUDA can
be lowered and exported anywhere.
"""

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from jax_flashattn import _compat, _dispatch, _native, _partition
from jax_flashattn._compat import mlir
from jax_flashattn._operands import Operands, is_absent, statistics_dtype
from jax_flashattn._primitives import flash_backward_p, flash_forward_p, flash_tangent_p

_CUDA_DTYPES = ("bfloat16", "float16")
# Scratch of more than 32 MB the C library takes from the system anew for every call, page by page.
# XLA keeps it together with a program's other temporaries.
_RECYCLED_BYTES = 30 << 20


def _scratch(platform: str, target: str, query, key, value, bias) -> dict[str, ShapeDtypeStruct]:
    """Buffers a call needs beside its results, by their name in _partition.py."""
    if platform == "cpu" and target == _native.BACKWARD:
        return {"accumulators": _accumulators(query, key, value, bias)}
    if platform == "CUDA" and target == _native.FORWARD:
        return {"counter": ShapeDtypeStruct((query.shape[0], key.shape[2], 1), jnp.int32)}
    if platform == "CUDA" and target == _native.BACKWARD:
        return {"workspace": _workspace(query, key, value)}
    return {}


def _workspace(query, key, value) -> ShapeDtypeStruct:
    """Of the CUDA backward, cut up in csrc/cuda/sm90/backward_workspace.h."""
    b, sq, hq, d = query.shape
    _, sk, g, _ = key.shape
    floats = 0  # of the plain kernels
    if _dispatch.backward_is_worth_tiles(sq, sk):
        width = -(-max(d, value.shape[3]) // 64) * 64
        tile = 128 if width == 64 else 64
        rows = -(-sq // tile) * tile
        floats = hq // max(g, 1) * (rows * (width + 2) + rows // 16) + 3 * rows + rows // 16 + 8
        floats += 4 * -(-sk // 128)
    return ShapeDtypeStruct((b, g, floats), jnp.float32)


def _accumulators(query, key, value, bias) -> ShapeDtypeStruct:
    """Of the CPU backward: one [sk, d + dv] per share of a key head's query rows, and a row
    of flags.

    The number of shares depends on sizes only, so results do not depend on the number of threads.
    Where a [sq, sk] bias is shared, what shares it is one task per share (bias_gradient.h).
    """
    b, sq, hq, d = query.shape
    _, sk, g, _ = key.shape
    columns = [d, value.shape[3]]
    if not is_absent(bias) and bias.shape[2] == 1 < bias.shape[3] and bias.shape != (b, hq, sq, sk):
        columns.append(hq // max(g, 1))  # a bias per key: its gradient lies beside dk and dv
    rows, width = sk + sk % 2 + 1, sum(-(-n // 16) * 16 for n in columns)  # whole vectors
    dtype = statistics_dtype(query.dtype)
    most_shares, wanted_tasks = 8, 16
    if not is_absent(bias) and min(bias.shape[2:]) > 1 and bias.shape[:2] != (b, hq):
        tasks = (b if bias.shape[0] > 1 else 1) * (g if bias.shape[1] > 1 else 1)
        shares = sq // 128
    else:
        tasks = b * g
        shares = sq * hq // max(g, 1) // 1024
        share_bytes = b * g * rows * width * dtype.itemsize
        if isinstance(share_bytes, int):  # else b is symbolic (jax.export)
            recycled = _RECYCLED_BYTES // max(share_bytes, 1)
            most_shares = min(most_shares, recycled) if recycled > 1 else most_shares
    shares = min(shares, -(-wanted_tasks // max(tasks, 1)), most_shares)
    return ShapeDtypeStruct((b, g, max(shares, 1), rows, width), dtype)


def _check_cuda(query, bias) -> None:
    if str(query.dtype) not in _CUDA_DTYPES:
        raise NotImplementedError(
            f"flash_attention on CUDA takes {' or '.join(_CUDA_DTYPES)}, got {query.dtype}; cast "
            "the inputs, or use implementation='reference'."
        )
    if not is_absent(bias):
        raise NotImplementedError(
            "CUDA does not support bias yet; flash_attention(implementation='reference') does."
        )


def _aval(x) -> _compat.ShapedArray:
    return _compat.ShapedArray(x.shape, x.dtype)


def _call(target: str, ctx, operands, spec, scratch, **extra):
    """One custom call; scratch buffers are extra results, dropped here."""
    call_ctx = ctx.replace(avals_out=[*ctx.avals_out, *map(_aval, scratch.values())])
    results = jax.ffi.ffi_lowering(target, **extra)(call_ctx, *operands, **spec.attributes())
    return results[: len(ctx.avals_out)]


def _partitionable_call(target: str, ctx, operands, spec, scratch, names):
    """The same call in logical form, with the attributes XLA partitions it by."""
    operand_names, result_names = names
    operand_names = _partition.present(operand_names, ctx.avals_in)
    result_names = _partition.present(result_names, ctx.avals_out)
    b, _, g, _ = ctx.avals_in[1].shape

    def logical(*xs):
        return [_partition.to_logical(n, x, b, g) for n, x in zip(operand_names, xs)]

    def user(*xs):
        shapes = [x.shape for x in ctx.avals_out]
        return [_partition.from_logical(n, x, s) for n, x, s in zip(result_names, xs, shapes)]

    def lower(fun, avals_in, avals_out, values):
        sub_ctx = ctx.replace(avals_in=avals_in, avals_out=avals_out)
        return mlir.lower_fun(fun, multiple_results=True)(sub_ctx, *values)

    avals_in = [_aval(x) for x in jax.eval_shape(logical, *map(_aval, ctx.avals_in))]
    avals_out = [
        _aval(jax.eval_shape(lambda x, n=n: _partition.to_logical(n, x, b, g), _aval(x)))
        for n, x in zip(result_names, ctx.avals_out)
    ]
    with_scratch = (*result_names, *scratch)
    rule = _partition.rule(operand_names, with_scratch)
    types = [
        [mlir.aval_to_ir_type(ctx.module_context, a) for a in avals]
        for avals in (avals_in, [*avals_out, *map(_aval, scratch.values())])
    ]
    values = lower(logical, ctx.avals_in, avals_in, operands)
    results = _call(
        target,
        ctx.replace(avals_in=avals_in, avals_out=avals_out),
        values,
        spec,
        scratch,
        operand_layouts=_partition.layouts(operand_names),
        result_layouts=_partition.layouts(with_scratch),
        extra_attributes={
            "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": "2"}),
            "sdy.sharding_rule": _compat.sharding_rule(
                rule, _partition.replicated_factors(rule), *types
            ),
        },
    )
    return lower(user, avals_out, ctx.avals_out, results)


def _lower(platform: str, target: str, names, ctx, *operands, spec):
    _native.require(platform)
    given = Operands(*ctx.avals_in[: len(Operands._fields)])
    query, key, value = given.query, given.key, given.value
    if platform == "CUDA":
        _check_cuda(query, given.bias)
    scratch = _scratch(platform, target, query, key, value, given.bias)
    if _compat.may_be_partitioned(ctx):
        return _partitionable_call(target, ctx, operands, spec, scratch, names)
    return _call(target, ctx, operands, spec, scratch)


def _register(primitive, target: str, names) -> None:
    for jax_platform, platform in (("cpu", "cpu"), ("cuda", "CUDA")):

        def rule(ctx, *operands, spec, platform=platform):
            return _lower(platform, target, names, ctx, *operands, spec=spec)

        mlir.register_lowering(primitive, rule, platform=jax_platform)


_register(flash_forward_p, _native.FORWARD, _partition.FORWARD)
_register(flash_backward_p, _native.BACKWARD, _partition.BACKWARD)
_register(flash_tangent_p, _native.TANGENT, _partition.TANGENT)
