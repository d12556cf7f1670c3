"""jax.export: a program is serialised, read back and run; for CUDA it is lowered without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import hlo
from support.compare import assert_bitwise

from jax_flashattn import _native, flash_attention

CHECKS = [export.DisabledSafetyCheck.custom_call(n) for n in (hlo.FORWARD, hlo.BACKWARD)]
X = jax.random.normal(jax.random.key(0), (2, 9, 2, 8), jnp.bfloat16)


def attend(q, k, v):
    return flash_attention(q, k, v, causal=True, lengths=jnp.array([9, 4], jnp.int32))


def gradient(q, k, v):
    return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("function", [attend, gradient])
def test_an_exported_program_is_the_program(function):
    exported = export.export(jax.jit(function), platforms=["cpu"], disabled_checks=CHECKS)(X, X, X)
    wanted = jax.jit(function)(X, X, X)
    for a, b in zip(jax.tree.leaves(exported.call(X, X, X)), jax.tree.leaves(wanted)):
        assert_bitwise(function.__name__, a, b)


@pytest.mark.parametrize("function", [attend, gradient])
def test_round_trip(function):
    exported = export.export(jax.jit(function), platforms=["cpu"], disabled_checks=CHECKS)(X, X, X)
    pytest.importorskip("flatbuffers")
    again = export.deserialize(exported.serialize())
    wanted = jax.jit(function)(X, X, X)
    for a, b in zip(jax.tree.leaves(again.call(X, X, X)), jax.tree.leaves(wanted)):
        assert_bitwise(function.__name__, a, b)


def test_gradient_of_an_exported_function():
    exported = export.export(jax.jit(attend), platforms=["cpu"], disabled_checks=CHECKS)(X, X, X)
    got = jax.grad(lambda *x: exported.call(*x).astype(jnp.float32).sum(), (0, 1, 2))(X, X, X)
    for a, b in zip(got, gradient(X, X, X)):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-2, atol=2e-2)


def test_lowering_for_cuda_without_its_extension_says_so():
    if "CUDA" in _native.modules:
        text = export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=CHECKS)(X, X, X)
        assert hlo.FORWARD in text.mlir_module()
        return
    with pytest.raises(ImportError, match=r"(?s)'CUDA'.*BUILD.md"):
        export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=CHECKS)(X, X, X)
