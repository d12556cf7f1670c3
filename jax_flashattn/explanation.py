"""explain: which kernel a call would run and what it would cost, without running it."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_flashattn import _dispatch, _mask, _native, _validate
from jax_flashattn._dispatch import Call, Kernel
from jax_flashattn._operands import Operands
from jax_flashattn._spec import AttentionSpec

PLATFORMS = (None, "cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many tiles of the score matrix a kernel skips, masks in part, and runs unmasked (S5)."""

    skipped: int
    partial: int
    full: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of an explained call.

    Attributes:
      kernel: the instance that runs; None if the call is refused.
      notes: why not a better kernel, and what would get it.
      tile: (rows, keys) of a tile, None for kernels without tiles.
      tiles: counted over the batch and all query heads; None if unknown.
      flops: of the products, over visible pairs; over all pairs if those are unknown.
      bytes: inputs read and results written once, the least any kernel can move.
    """

    kernel: str | None
    notes: tuple[str, ...]
    tile: tuple[int, int] | None
    tiles: Tiles | None
    flops: int
    bytes: int

    def __str__(self) -> str:
        """Two lines and one per note."""
        lines = [self.kernel or "REFUSED"]
        if self.tiles is not None and self.tile is not None:
            rows, keys = self.tile
            lines.append(
                f"tiles of {rows} x {keys}: {self.tiles.full:,} full, {self.tiles.partial:,} "
                f"partial, {self.tiles.skipped:,} skipped"
            )
        elif self.tile is not None:
            lines.append(f"tiles of {self.tile[0]} x {self.tile[1]}: the limits are not known here")
        lines.append(f"{self.flops / 1e9:,.3f} GFLOP, {self.bytes / 1e6:,.3f} MB at least")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What explain returns; print it.

    Attributes:
      call: shapes and dtype in one line.
      platform: "cpu" or "cuda".
      problem: why this installation has no kernels for the platform, None if it has them.
      mask: how rows find their keys, in words.
      visible_pairs: query-key pairs over batch and query heads; None if the limits are not known.
      forward: the forward pass.
      backward: the backward pass.
      tangent: the tangents of differentiation="forward".
    """

    call: str
    platform: str
    problem: str | None
    mask: str
    visible_pairs: int | None
    forward: Pass
    backward: Pass
    tangent: Pass

    def __str__(self) -> str:
        """The page."""
        pairs = "unknown" if self.visible_pairs is None else f"{self.visible_pairs:,}"
        lines = [
            f"flash_attention on {self.platform}: {self.call}",
            f"mask: {self.mask}; visible pairs: {pairs}",
        ]
        if self.problem is not None:
            lines.append(f"not installed here: {self.problem}")
        for name in ("forward", "backward", "tangent"):
            one = getattr(self, name)
            first, *rest = str(one).splitlines()
            lines += [f"{name:>8}  {first}", *(f"{'':>8}  {line}" for line in rest)]
        return "\n".join(lines)


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    platform: Literal["cpu", "cuda"] | None = None,
    compute_capability: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    segment_ids: Any = None,
    lengths: Any = None,
    mask: Any = None,
    bias: Any = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    implementation: Literal["kernel", "reference"] | None = None,
) -> Explanation:
    """Which kernels flash_attention would run for these arguments, why, and at what cost.

    Runs no attention and needs no GPU and no data. Wrong arguments raise what flash_attention
    raises; what a platform refuses is said.

    Args:
      query: as all arguments not named here, those of flash_attention; arrays or
        jax.ShapeDtypeStruct.
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv].
      platform: "cpu" or "cuda"; None for the one jax would use.
      compute_capability: of the GPU, as "9.0"; None for that of the attached one, else 9.0.
      causal: bottom-right aligned.
      window: (left, right).
      scale: factor on the scores.
      softcap: as in flash_attention.
      alibi_slopes: float32 [hq] or [b, hq].
      segment_ids: if given as a ShapeDtypeStruct, as lengths or mask too, tiles are not counted.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].
      bias: [b or 1, hq or 1, sq or 1, sk or 1].
      sinks: float32 [hq].
      dropout_rate: as in flash_attention.
      dropout_key: one jax.random key.
      deterministic: as in flash_attention.
      implementation: as in flash_attention.

    Returns:
      an Explanation: print it, or read its fields.

    Raises:
      TypeError, ValueError: as flash_attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashattn import explain
      >>> q = jax.ShapeDtypeStruct((2, 4096, 16, 60), jnp.bfloat16)
      >>> print(explain(q, q, q, causal=True, platform="cuda").forward)
      cuda plain forward, bfloat16
      64.440 GFLOP, 63.439 MB at least
      note: the tensor-core kernel needs head dims that are multiples of 8, d is 60: pad to 64 (and keep scale)
      note: the tensor-core kernel needs head dims that are multiples of 8, dv is 60: pad to 64 (and keep scale)
    """  # noqa: E501
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {PLATFORMS}, got {platform!r}.")
    _validate.check_implementation(implementation)
    query, key, value = arrays = [_described(x) for x in (query, key, value)]
    masks = {"segment_ids": segment_ids, "lengths": lengths, "mask": mask}
    options = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "dropout_rate": dropout_rate,
        "deterministic": deterministic,
    }
    features = {
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "sinks": sinks,
        "dropout_key": dropout_key,
    }
    operands, spec, limits = _prepared(arrays, masks, features, options)
    uses_intervals = operands.lo is not None
    b, sq, hq, d = query.shape
    _, sk, hk, dv = value.shape
    call = Call(b, sq, sk, hq, hk, d, dv, str(query.dtype), _features(operands, spec))
    platform = platform or ("cpu" if jax.default_backend() == "cpu" else "cuda")
    kernels = _kernels(call, platform, compute_capability, implementation)
    pairs = _visible_pairs(call, limits)
    passes = (
        Pass(
            kernel.name,
            kernel.notes,
            kernel.tile,
            _tiles(call, limits, kernel.tile),
            (b * hq * sq * sk if pairs is None else pairs) * per_pair,
            moved,
        )
        for kernel, per_pair, moved in zip(
            kernels,
            (2 * (d + dv), 2 * (3 * d + 2 * dv), 2 * (3 * d + 2 * dv)),
            _bytes(call, operands),
            strict=True,
        )
    )
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}, {call.dtype}"
    words = _mask_in_words(spec, uses_intervals, lengths is not None)
    needed = None if implementation == "reference" else {"cpu": "cpu", "cuda": "CUDA"}[platform]
    problem = _native.problems.get(needed) if needed else None
    return Explanation(shapes, platform, problem, words, pairs, *passes)


def _kernels(
    call: Call, platform: str, capability: str | None, implementation: str | None
) -> tuple[Kernel, Kernel, Kernel]:
    """Of the forward, the backward and the tangent."""
    if implementation == "reference":
        size = max(jnp.dtype(call.dtype).itemsize, 4) * call.b * call.hq * call.sq * call.sk
        kernel = Kernel(
            "reference (jax.numpy)", notes=(f"as asked; a matrix of scores has {size:,} bytes",)
        )
        return kernel, kernel, kernel
    if platform == "cpu":
        kernel = _dispatch.cpu_kernel(call, _cpu_instruction_set())
        return kernel, kernel, kernel
    capability = capability or _attached_capability() or _dispatch.SM90
    return (
        _dispatch.cuda_forward(call, capability),
        _dispatch.cuda_backward(call, capability),
        _dispatch.cuda_tangent(call),
    )


def _visible_pairs(call: Call, limits: Any) -> int | None:
    """Over batch and query heads."""
    if limits is None:
        return None
    each = np.maximum(limits[1] - limits[0], 0).sum(axis=1, dtype=np.int64)
    return int(np.broadcast_to(each, (call.b,)).sum()) * call.hq


def _described(x: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(
            f"explain takes arrays or jax.ShapeDtypeStruct, got {type(x).__name__}: {x!r}."
        )
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _features(operands: Operands, spec: AttentionSpec) -> tuple[str, ...]:
    """Arguments beyond scale and mask that change anything, by their names."""
    given = {
        "softcap": spec.softcap != 0,
        "alibi_slopes": operands.slopes is not None,
        "bias": operands.bias is not None,
        "sinks": operands.sinks is not None,
        "dropout": operands.dropout is not None,
    }
    return tuple(name for name, is_given in given.items() if is_given)


def _prepared(
    arrays: list[jax.ShapeDtypeStruct],
    masks: dict[str, Any],
    features: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Operands, AttentionSpec, tuple[np.ndarray, np.ndarray] | None]:
    """Shapes of the operands; the spec; the rows' limits [b or 1, sq] if known."""
    found: list[Any] = []

    def prepare(arrays, features, masks):
        operands, spec = _validate.prepare(*arrays, **masks, **features, **options)
        found[:] = jax.tree.map(_described, operands), spec

    def limits():
        zeros = [jnp.zeros(x.shape, x.dtype) for x in arrays]  # never computed: nothing uses them
        windows = {n: options[n] for n in ("causal", "window", "scale", "deterministic")}
        operands, spec = _validate.prepare(*zeros, **masks, **windows)
        sk = arrays[1].shape[1]
        return [jnp.clip(x, 0, sk) for x in _validate.row_limits(operands, spec)]

    abstract = (jax.ShapeDtypeStruct, Tracer)
    known = not any(isinstance(x, abstract) for x in jax.tree.leaves(masks))
    wide = jax.config.jax_enable_x64 or arrays[0].dtype == "float64"  # pyright: ignore
    with jax.enable_x64(wide):
        if not known:
            jax.eval_shape(prepare, arrays, features, masks)
            return *found, None
        jax.eval_shape(functools.partial(prepare, masks=masks), arrays, features)
        operands, spec = found
        compiled = jax.jit(limits).lower().compile()
        with jax.ensure_compile_time_eval():  # also where explain is called under a trace
            lo, hi = compiled()
    return operands, spec, (np.asarray(lo), np.asarray(hi))


def _tiles(call: Call, limits: Any, tile: tuple[int, int] | None) -> Tiles | None:
    """Counted on the grid of the kernel's tile."""
    if limits is None or tile is None:
        return None
    rows, keys = tile
    b, sq = limits[0].shape
    if not b * sq * call.sk:
        return Tiles(0, 0, 0)
    lo, hi = limits
    with jax.ensure_compile_time_eval():
        classify = jax.jit(_mask.tile_classes, static_argnums=(1, 2, 3))
        classes = np.asarray(classify((lo, hi), call.sk, rows, keys))
    each = call.hq * (call.b // b)
    counts = [int((classes == kind).sum()) * each for kind in range(3)]
    return Tiles(counts[_mask.SKIP], counts[_mask.PARTIAL], counts[_mask.FULL])


def _bytes(call: Call, operands: Operands) -> tuple[int, int, int]:
    """Least traffic of the forward, the backward and the tangent."""
    element = jnp.dtype(call.dtype).itemsize
    size = {n: x.size * x.dtype.itemsize for n, x in operands._asdict().items() if x is not None}
    gradients = sum(size.get(n, 0) for n in ("query", "key", "value", "bias"))
    inputs = sum(size.values())
    vectors = call.b * call.sq * call.hq
    out, statistic = element * vectors * call.dv, max(element, 4) * vectors
    without_sinks = inputs - size.get("sinks", 0)
    # The backward reads dout, lse and delta; the tangent reads out, lse, the tangents of what has
    # gradients and of the sinks as a number a row, and writes tangents of out and lse.
    return (
        inputs + out + statistic,
        without_sinks + out + 2 * statistic + gradients,
        without_sinks + gradients + 2 * out + 3 * statistic,
    )


def _mask_in_words(spec: AttentionSpec, uses_intervals: bool, has_lengths: bool) -> str:
    if uses_intervals:
        return "row limits read from arrays"
    sides = {"left": spec.left, "right": spec.right}
    window = ", ".join(f"{name} {side}" for name, side in sides.items() if side is not None)
    words = f"arithmetic, {window}" if window else "none" if not has_lengths else "arithmetic"
    return f"{words}, lengths" if has_lengths else words


def _cpu_instruction_set() -> str | None:
    return _native.modules["cpu"].instruction_set() if "cpu" in _native.modules else None


def _attached_capability() -> str | None:
    """Of the first GPU, if jax has one."""
    try:
        return jax.devices("gpu")[0].compute_capability
    except RuntimeError:
        return None
