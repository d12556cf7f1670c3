"""The CUDA backward's scratch: _lowering.py allocates what backward_workspace.h cuts up."""

import itertools
import subprocess

import jax
import jax.numpy as jnp
import pytest
from support.compiled import compile_cxx

from jax_flashattn import _dispatch, _lowering

# Lines of b, g, r, sq, sk, d, dv on the input; workspace_floats and the end of the last array.
PROGRAM = """
#include <cstdio>
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
#include "cuda/sm90/backward_workspace.h"
int main() {
  using namespace jax_flashattn;
  Sizes n;
  int64_t* const to[] = {&n.b, &n.g, &n.r, &n.sq, &n.sk, &n.d, &n.dv};
  for (int at = 0; std::scanf("%ld", to[at]) == 1; at = (at + 1) % 7) {
    if (at < 6) continue;
    const cuda::sm90::BackwardWorkspace w(nullptr, n);
    const int64_t rows = cuda::sm90::padded_width(n) == 64 ? 128 : 64;
    const int64_t tiles = cuda::sm90::padded_rows(n) / rows;
    const auto end = reinterpret_cast<intptr_t>(w.ranges + n.b * tiles) / 4;
    std::printf("%ld %ld\\n", (long)cuda::sm90::workspace_floats(n), (long)end);
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    source = tmp_path_factory.mktemp("workspace") / "program.cc"
    source.write_text(PROGRAM)
    untested = "the two formulas of the workspace are NOT compared"
    return compile_cxx(source.with_suffix(""), [source], "-w", untested=untested)


def test_python_allocates_what_the_kernels_use(program):
    sizes = list(
        itertools.product(
            (1, 3), (1, 2), (1, 4), (1, 32, 33, 128, 200), (1, 1024, 1025), (8, 64, 72, 256),
            (8, 128),
        )
    )  # fmt: skip
    text = "\n".join(" ".join(map(str, n)) for n in sizes)
    answer = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    lines = [tuple(map(int, line.split())) for line in answer.stdout.splitlines()]
    assert len(lines) == len(sizes)
    for (b, g, r, sq, sk, d, dv), (floats, end) in zip(sizes, lines):
        shapes = (b, sq, g * r, d), (b, sk, g, d), (b, sk, g, dv)
        workspace = _lowering._workspace(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))
        assert workspace.shape == (b, g, floats), (b, g, r, sq, sk, d, dv)
        assert bool(floats) == _dispatch.backward_is_worth_tiles(sq, sk)
        assert not floats or end <= b * g * floats, "the arrays end behind the workspace"
