"""Which kernel a call gets, and why not a better one: csrc's dispatch in words.

The decision is made in csrc (cuda/dispatch.cc, cuda/sm90/forward.cu and backward.cu, cpu/tile.h);
this table only tells of it. tests/unit/test_explain.py holds the two together.
"""

import dataclasses

CPU_TILE = (64, 96)  # rows, keys: kRows and kTileKeys of cpu/tile.h
BF16_SETS = ("avx512_bf16", "amx")  # instruction sets that multiply bfloat16
CUDA_DTYPES = ("bfloat16", "float16")
SM90 = "9.0"
# Largest head dim -> (rows, keys) of the Hopper forward: Tuned of cuda/sm90/forward.cu.
SM90_FORWARD_TILES = {
    64: (192, 128),
    96: (128, 128),
    128: (128, 128),
    192: (128, 96),
    256: (128, 80),
}
# What differs with dropout, else with softcap, else with ALiBi.
SM90_EXTENT_FORWARD_TILES = {
    "dropout": {64: (128, 128), 192: (128, 64), 256: (128, 64)},
    "softcap": {64: (128, 128)},
    "alibi_slopes": {64: (128, 128), 256: (128, 64)},
}
# The same of the backward: TunedBackward of cuda/sm90/backward.cu.
SM90_BACKWARD_TILES = {
    64: (128, 128),
    96: (64, 128),
    128: (64, 128),
    192: (64, 64),
    256: (64, 64),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What the choice of a kernel depends on.

    b, sq, ... are sizes; features are the arguments of flash_attention beyond scale and mask, as
    far as they change anything.
    """

    b: int
    sq: int
    sk: int
    hq: int
    hk: int
    d: int
    dv: int
    dtype: str
    features: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, as explain tells of it.

    Attributes:
      name: implementation and instance; None if the call is refused.
      tile: (rows, keys) it works on at once, None if it has no tiles.
      notes: why not a better one, and what would get it.
    """

    name: str | None
    tile: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def cpu_kernel(call: Call, instruction_set: str | None) -> Kernel:
    """All passes alike."""
    if instruction_set is None:
        return Kernel(None, notes=("no instruction set: python -m jax_flashattn says why",))
    notes = []
    if call.dtype in ("bfloat16", "float16") and instruction_set not in BF16_SETS:
        notes.append(f"{call.dtype} is widened to float32: no AMX or fast AVX512-BF16 here")
    elif call.dtype == "float16":
        notes.append("float16 is widened to float32: only bfloat16 has products of its own")
    return Kernel(f"cpu {instruction_set}, {call.dtype}", CPU_TILE, tuple(notes))


def cuda_forward(call: Call, capability: str) -> Kernel:
    """The Hopper kernel if it fits, else the plain one."""
    extents = [tiles for name, tiles in SM90_EXTENT_FORWARD_TILES.items() if name in call.features]
    tiles = SM90_FORWARD_TILES | (extents[0] if extents else {})
    return _cuda_kernel("forward", call, tiles, capability)


def backward_is_worth_tiles(sq: int, sk: int) -> bool:
    """Whether the Hopper backward takes a call: `worth_tiles` of backward_workspace.h."""
    return sq > 32 or sk > 1024


def cuda_backward(call: Call, capability: str) -> Kernel:
    """Likewise."""
    notes = ()
    if not backward_is_worth_tiles(call.sq, call.sk):
        notes = ("a few rows would fill few of the tensor-core kernel's tiles",)
    return _cuda_kernel("backward", call, SM90_BACKWARD_TILES, capability, notes)


def cuda_tangent(call: Call) -> Kernel:
    """One kernel for every GPU."""
    notes = _refusals(call)
    if notes:
        return Kernel(None, notes=notes)
    notes = ("there is no tensor-core kernel of tangents",)
    return Kernel(f"cuda plain tangent, {call.dtype}", None, notes)


def _refusals(call: Call) -> tuple[str, ...]:
    """Why CUDA takes no such call at all."""
    refusals = []
    if call.dtype not in CUDA_DTYPES:
        wanted = " or ".join(CUDA_DTYPES)
        refusals.append(f"CUDA kernels take {wanted}, not {call.dtype}: cast the inputs")
    if "bias" in call.features:
        refusals.append("CUDA kernels take no bias yet: implementation='reference' does")
    return tuple(refusals)


def _cuda_kernel(
    which: str, call: Call, tiles: dict, capability: str, notes: tuple[str, ...] = ()
) -> Kernel:
    if refusals := _refusals(call):
        return Kernel(None, notes=refusals)
    if notes := (*_why_plain(call, capability), *notes):
        return Kernel(f"cuda plain {which}, {call.dtype}", None, notes)
    width = max(call.d, call.dv)
    instance = next(limit for limit in tiles if width <= limit)
    return Kernel(f"cuda sm90 {which}, head dim {instance}, {call.dtype}", tiles[instance])


def _why_plain(call: Call, capability: str) -> tuple[str, ...]:
    """What keeps a call from the tensor-core kernels."""
    notes = []
    if capability != SM90:
        notes.append(
            f"the tensor-core kernel needs compute capability {SM90} (H100, H200), "
            f"this is {capability}"
        )
    for name, width in (("d", call.d), ("dv", call.dv)):
        if width % 8:
            notes.append(
                f"the tensor-core kernel needs head dims that are multiples of 8, {name} is "
                f"{width}: pad to {width + -width % 8} (and keep scale)"
            )
    if call.sk == 0:
        notes.append("the tensor-core kernel needs at least one key")
    tiles = max(call.hq * -(-call.sq // 64), call.hk * -(-call.sk // 64))
    if call.b * tiles >= 2**31 - 1:
        notes.append("the tensor-core kernel counts tiles in 32 bits: split the batch")
    return tuple(notes)
