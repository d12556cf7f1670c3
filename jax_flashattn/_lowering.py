"""Lowering of the primitives to FFI custom calls: layouts, attributes, scratch, sharding rule.

No GPU is queried here, so a program for CUDA can be lowered and exported anywhere.
"""

import jax
from jax import ShapeDtypeStruct

from jax_flashattn import _compat, _native
from jax_flashattn._compat import mlir
from jax_flashattn._primitives import flash_backward_p, flash_forward_p, statistics_dtype

# Minor-to-major layouts that keep memory b, s, h, d under the logical shapes of _primitives.py.
_ROWS = (4, 2, 1, 3, 0)  # [b, g, r, s, d]
_KEYS = (3, 1, 2, 0)  # [b, g, s, d]
_STATISTICS = (3, 2, 1, 0)  # [b, g, r, s]
_MASK = (2, 1, 0)  # [b, 1, n]

_INPUTS = (_ROWS, _KEYS, _KEYS, _MASK, _MASK, _MASK)
_INPUT_RULE = "b g r s d, b g t d, b g t e, b h m, b h l, b h n"

_CUDA_DTYPES = ("bfloat16", "float16")


def _backward_scratch(query, key, value) -> ShapeDtypeStruct:
    """Accumulators of the CPU backward: one [sk, d + dv] per share of a key head's query rows.

    The number of shares depends on sizes only, so results do not depend on the number of threads.
    """
    b, g, r, sq, d = query.shape
    wanted_tasks, most_shares, rows_per_share = 32, 8, 1024
    shares = min(r * sq // rows_per_share, -(-wanted_tasks // max(b * g, 1)), most_shares)
    width = sum(-(-n // 16) * 16 for n in (d, value.shape[-1]))  # rows of whole vectors
    sk = key.shape[2]
    return ShapeDtypeStruct(
        (b, g, max(shares, 1), sk + sk % 2, width), statistics_dtype(query.dtype)
    )


def _check_cuda(query) -> None:
    if str(query.dtype) not in _CUDA_DTYPES:
        raise NotImplementedError(
            f"flash_attention on CUDA takes {' or '.join(_CUDA_DTYPES)}, got {query.dtype}; cast "
            "the inputs, or use implementation='reference'."
        )


def _lower(target: str, ctx, operands, spec, layouts, scratch, rule: str, result_layouts):
    """One custom call; scratch buffers are extra results, dropped here."""
    scratch_layouts = [tuple(reversed(range(len(s.shape)))) for s in scratch]
    scratch_avals = [jax.core.ShapedArray(s.shape, s.dtype) for s in scratch]
    call_ctx = ctx.replace(avals_out=[*ctx.avals_out, *scratch_avals])
    types = [
        [mlir.aval_to_ir_type(ctx.module_context, aval) for aval in avals]
        for avals in (ctx.avals_in, call_ctx.avals_out)
    ]
    extra = "".join(", b g w x y" for _ in scratch)
    replicated = tuple(f for f in "r s d t e h m l n w x y".split() if f in (rule + extra).split())
    call = jax.ffi.ffi_lowering(
        target,
        operand_layouts=layouts,
        result_layouts=[*result_layouts, *scratch_layouts],
        extra_attributes={
            "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": "2"}),
            "sdy.sharding_rule": _compat.sharding_rule(rule + extra, replicated, *types),
        },
    )
    results = call(call_ctx, *operands, **spec.attributes())
    return results[: len(ctx.avals_out)]


def _forward_rule(platform: str):
    def lower(ctx, *operands, spec):
        _native.require(platform)
        if platform == "CUDA":
            _check_cuda(ctx.avals_in[0])
        rule = f"{_INPUT_RULE} -> b g r s e, b g r s"
        return _lower(
            _native.FORWARD, ctx, operands, spec, _INPUTS, [], rule, [_ROWS, _STATISTICS]
        )

    return lower


def _backward_rule(platform: str):
    def lower(ctx, *operands, spec):
        _native.require(platform)
        query, key, value = ctx.avals_in[:3]
        if platform == "CUDA":
            _check_cuda(query)
        scratch = [_backward_scratch(query, key, value)] if platform == "cpu" else []
        rule = f"{_INPUT_RULE}, b g r s e, b g r s, b g r s -> b g r s d, b g t d, b g t e"
        layouts = [*_INPUTS, _ROWS, _STATISTICS, _STATISTICS]
        return _lower(
            _native.BACKWARD, ctx, operands, spec, layouts, scratch, rule, [_ROWS, _KEYS, _KEYS]
        )

    return lower


for _platform, _target_platform in (("cpu", "cpu"), ("cuda", "CUDA")):
    mlir.register_lowering(flash_forward_p, _forward_rule(_target_platform), platform=_platform)
    mlir.register_lowering(flash_backward_p, _backward_rule(_target_platform), platform=_platform)
