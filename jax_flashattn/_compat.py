"""The only place that touches private or version-dependent jax (0.10 to 0.12)."""

from collections.abc import Sequence

import jax
from jax import Array
from jax._src import core, dispatch
from jax._src.core import ShapedArray
from jax._src.custom_partitioning_sharding_rule import (
    sdy_sharding_rule_to_mlir,
    str_to_sdy_sharding_rule,
)
from jax._src.sharding_impls import ShardingContext, SPMDAxisContext
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["Primitive", "ShapedArray", "ad", "batching", "mlir"]


def make_primitive(name: str) -> Primitive:
    """A primitive with several results that can also be called eagerly."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    dispatch.simple_impl(primitive)
    return primitive


def _varying(x) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def axes_of(aval: ShapedArray) -> tuple:
    """In explicit sharding mode what each axis is split over, else all None."""
    return tuple(aval.sharding.spec)


def result_avals(
    name: str,
    operands: Sequence,
    results: Sequence[tuple[tuple[int, ...], jax.typing.DTypeLike, tuple]],
) -> tuple:
    """Types of results (shape, dtype, axes) with the operands' mesh and manual axes.

    The latter are for shard_map's check_vma, the axes for explicit sharding mode.
    """
    core.standard_vma_rule(name, *operands)
    mesh = operands[0].sharding.mesh
    return tuple(
        ShapedArray(
            shape,
            dtype,
            sharding=NamedSharding(mesh, P(*axes)),
            manual_axis_type=operands[0].manual_axis_type,
        )
        for shape, dtype, axes in results
    )


def match_varying(operands: Sequence[Array]) -> list[Array]:
    """Casts operands to vary over the same manual axes, as one primitive needs."""
    union = frozenset().union(*(_varying(x) for x in operands))
    cast = []
    for x in operands:
        missing = tuple(union - _varying(x))
        cast.append(jax.lax.pcast(x, missing, to="varying") if missing else x)
    return cast


def match_cotangent(cotangent: Array, primal: Array) -> Array:
    """Sums a cotangent over manual axes that its primal does not vary on, and lays it like that."""
    axes = tuple(_varying(cotangent) - _varying(primal))
    cotangent = jax.lax.psum(cotangent, axes) if axes else cotangent
    wanted = jax.typeof(primal).sharding
    if jax.typeof(cotangent).sharding.spec == wanted.spec:
        return cotangent
    return jax.sharding.reshard(cotangent, wanted)  # explicit sharding mode


def may_be_partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA may split the operation over devices: more than one, not all axes manual."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, SPMDAxisContext):
        return frozenset(axes.mesh.axis_names) != axes.manual_axes
    return isinstance(axes, ShardingContext) and axes.num_devices != 1


def sharding_rule(rule: str, replicated: tuple[str, ...], operand_types, result_types):
    """A Shardy rule as an MLIR attribute; `replicated` factors in order of first appearance."""
    parsed = str_to_sdy_sharding_rule(rule, need_replication_factors=replicated)
    return sdy_sharding_rule_to_mlir(parsed, operand_types, result_types)
