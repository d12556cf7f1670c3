"""Every CPU instruction set this machine has computes the same function."""

import pytest
from support import programs

NO_KERNELS = "JAX_FLASHATTN_CPU_ISA"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_instruction_set(isa, tmp_path):
    """A small grid in a process of its own; a set this CPU lacks must say so."""
    found = programs.run("isa", tmp_path / "out.npz", JAX_FLASHATTN_CPU_ISA=isa)
    if str(found["name"]) == "None":
        assert isa != "baseline", "baseline runs everywhere"
        assert NO_KERNELS in str(found["error"])
        pytest.skip(f"this CPU has no {isa}")
    assert str(found["name"]) == isa


def test_an_unknown_set_is_a_clear_error(tmp_path):
    found = programs.run("isa", tmp_path / "out.npz", JAX_FLASHATTN_CPU_ISA="pentium")
    assert str(found["name"]) == "None"
    assert NO_KERNELS in str(found["error"])
    assert "names no instruction set of this CPU" in str(found["error"])
