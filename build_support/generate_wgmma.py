"""Writes ptx/wgmma_shapes.h into the build tree: one wrapper per wgmma width and element type.

An instruction names all of its 16 to 128 accumulator registers; nobody should type those.

usage: generate_wgmma.py OUTPUT
"""

import pathlib
import sys

WIDTHS = (64, 80, 96, 128, 192, 256)
TYPES = {"bf16": "__nv_bfloat16", "f16": "__half"}

HIGH = "0x40000040"  # high word of every descriptor: swizzle 1, stride 1024 bytes / 16

HEADER = """// Written by build_support/generate_wgmma.py; do not edit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flashattn::cuda::ptx {

// A shared-memory operand in the 128-byte swizzle: the low word of its descriptor. The high word is
// always the same: 8 rows of 128 bytes, swizzle 1.
struct Operand {
  uint32_t low;
};
template <class T, int kN, int kTransA, int kTransB>
struct WgmmaShared;
template <class T, int kN, int kTransB>
struct WgmmaRegister;
"""


def _accumulators(n: int, first: int) -> str:
    return ", ".join(f"%{first + i}" for i in range(n // 2))


def _outputs(n: int) -> str:
    return ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))


def _shared(ptx_type: str, cpp_type: str, n: int) -> str:
    count = n // 2
    return f"""
// D (+)= A B, both operands in shared memory.
template <int kTransA, int kTransB>
struct WgmmaShared<{cpp_type}, {n}, kTransA, kTransB> {{
  static __device__ __forceinline__ void issue(float (&d)[{count}], Operand a, Operand b,
                                               int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\n.reg .b64 a, b;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "mov.b64 a, {{%{count}, {HIGH}}};\\nmov.b64 b, {{%{count + 1}, {HIGH}}};\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx_type}.{ptx_type} "
        "{{{_accumulators(n, 0)}}}, a, b, p, 1, 1, "
        "%{count + 3}, %{count + 4};\\n}}\\n"
        : {_outputs(n)}
        : "r"(a.low), "r"(b.low), "r"(accumulate), "n"(kTransA), "n"(kTransB));
  }}
}};
"""


def _register(ptx_type: str, cpp_type: str, n: int) -> str:
    count = n // 2
    operands = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
// D (+)= A B, A in registers.
template <int kTransB>
struct WgmmaRegister<{cpp_type}, {n}, kTransB> {{
  static __device__ __forceinline__ void issue(float (&d)[{count}], const uint32_t (&a)[4],
                                               Operand b, int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\n.reg .b64 b;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
        "mov.b64 b, {{%{count + 4}, {HIGH}}};\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx_type}.{ptx_type} "
        "{{{_accumulators(n, 0)}}}, {{{operands}}}, b, p, 1, 1, "
        "%{count + 6};\\n}}\\n"
        : {_outputs(n)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(accumulate), "n"(kTransB));
  }}
}};
"""


def main(output: str) -> None:
    text = [HEADER]
    for ptx_type, cpp_type in TYPES.items():
        for n in WIDTHS:
            text += [_shared(ptx_type, cpp_type, n), _register(ptx_type, cpp_type, n)]
    text.append("\n}  // namespace jax_flashattn::cuda::ptx\n")
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(output).write_text("".join(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
