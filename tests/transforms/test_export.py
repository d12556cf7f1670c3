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


def symbolic(function, platforms):
    """The exported program for any batch size, after a round trip through bytes."""
    pytest.importorskip("flatbuffers")
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, *X.shape[1:]), X.dtype)
    made = export.export(jax.jit(function), platforms=platforms, disabled_checks=CHECKS)(x, x, x)
    return export.deserialize(made.serialize())


def packed(q, k, v):
    ids = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 0], jnp.int32), 3), q.shape[:2])
    return flash_attention(q, k, v, causal=True, segment_ids=ids)


def square(q, k, v):
    """attend for any batch size: its own lengths are for two."""
    return flash_attention(q, k, v, causal=True, window=(4, 0))


def square_gradient(q, k, v):
    return jax.grad(lambda *x: square(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("function", [square, square_gradient, packed])
def test_any_batch_size(function):
    """One exported program serves all batch sizes: the batch may be symbolic."""
    again = symbolic(function, ["cpu"])
    for n in (1, 2, 5):
        x = jax.random.normal(jax.random.key(n), (n, *X.shape[1:]), X.dtype)
        wanted = jax.jit(function)(x, x, x)
        for a, b in zip(jax.tree.leaves(again.call(x, x, x)), jax.tree.leaves(wanted)):
            assert_bitwise(function.__name__, a, b)


def test_the_sequence_may_not_be_symbolic():
    """Window sides are normalised with the lengths (S3), so these are known when tracing."""
    (s,) = export.symbolic_shape("s")
    x = jax.ShapeDtypeStruct((2, s, 2, 8), X.dtype)
    with pytest.raises(Exception, match="Symbolic dimension"):
        export.export(jax.jit(square), platforms=["cpu"], disabled_checks=CHECKS)(x, x, x)


@pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]], ids=str)
@pytest.mark.parametrize("function", [attend, gradient, square_gradient])
def test_export_for_cuda_needs_no_gpu(monkeypatch, function, platforms):
    """Lowered on this machine, whatever it has; only loading the program needs the extension."""
    monkeypatch.setitem(_native.modules, "CUDA", _native.modules.get("CUDA"))
    if function is square_gradient:
        again = symbolic(function, platforms)
    else:
        pytest.importorskip("flatbuffers")
        again = export.export(jax.jit(function), platforms=platforms, disabled_checks=CHECKS)
        again = export.deserialize(again(X, X, X).serialize())
    assert again.platforms == tuple(platforms)
    text = again.mlir_module()
    for name in (hlo.FORWARD,) if function is attend else (hlo.FORWARD, hlo.BACKWARD):
        assert text.count(f"@{name}") == len(platforms), name
    if "cpu" in platforms:
        for a, b in zip(*map(jax.tree.leaves, (again.call(X, X, X), jax.jit(function)(X, X, X)))):
            assert_bitwise(function.__name__, a, b)


def test_lowering_for_cuda_without_its_extension_says_so():
    if "CUDA" in _native.modules:
        text = export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=CHECKS)(X, X, X)
        assert hlo.FORWARD in text.mlir_module()
        return
    fresh = jax.jit(lambda *x: attend(*x))  # attend itself may have been lowered above, and kept
    with pytest.raises(ImportError, match=r"(?s)'CUDA'.*BUILD.md"):
        export.export(fresh, platforms=["cuda"], disabled_checks=CHECKS)(X, X, X)
