"""Rotary embedding against complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn import apply_rotary_emb

ROWS = 40


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def tables(rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(ROWS)[:, None] * 100.0 ** (-np.arange(rotary_dim // 2) / rotary_dim)
    return np.cos(angle), np.sin(angle)


def turned(x, positions, rotary_dim, interleaved):
    """x [n, h, d] at positions [n]: pairs as complex numbers times exp(i angle)."""
    x, half = x.copy(), rotary_dim // 2
    first = slice(0, rotary_dim, 2) if interleaved else slice(0, half)
    second = slice(1, rotary_dim, 2) if interleaved else slice(half, rotary_dim)
    cos, sin = tables(rotary_dim)
    z = (x[..., first] + 1j * x[..., second]) * (cos + 1j * sin)[positions][:, None]
    x[..., first], x[..., second] = z.real, z.imag
    return x


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 7, (3, 0, 20)], ids=str)
@pytest.mark.parametrize("traced", [False, True])
def test_batch(rotary_dim, interleaved, offsets, traced):
    x = normal(0, 3, 9, 2, 32)
    offsets = np.array(offsets, np.int32) if isinstance(offsets, tuple) else offsets

    def call(x, offsets):
        return apply_rotary_emb(x, *tables(rotary_dim), interleaved, seqlen_offsets=offsets)

    result = (jax.jit(call) if traced else call)(x, offsets)
    for n, first in enumerate(np.broadcast_to(offsets, 3)):
        wanted = turned(x[n], first + np.arange(9), rotary_dim, interleaved)
        np.testing.assert_allclose(result[n], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("offsets", [0, (3, 9, 20)], ids=str)
def test_sequences_one_after_the_other(offsets):
    x, cu = normal(0, 12, 2, 32), np.array([0, 5, 5, 10], np.int32)
    offsets = np.array(offsets, np.int32) if isinstance(offsets, tuple) else offsets
    result = apply_rotary_emb(x, *tables(16), seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=5)
    first = np.broadcast_to(offsets, 3)
    positions = np.concatenate([first[0] + np.arange(5), first[2] + np.arange(5), [0, 0]])
    np.testing.assert_allclose(result, turned(x, positions, 16, False), rtol=1e-12, atol=1e-14)


def test_computed_in_float32():
    x = jnp.asarray(normal(0, 1, 9, 2, 32), jnp.bfloat16)
    cos, sin = (jnp.asarray(t, jnp.float32) for t in tables(32))
    result = apply_rotary_emb(x, cos, sin)
    assert result.dtype == jnp.bfloat16
    wanted = turned(np.asarray(x[0], np.float64), np.arange(9), 32, False)
    np.testing.assert_array_equal(result[0], jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))


def test_errors():
    x, (cos, sin) = normal(0, 1, 9, 2, 16), tables(16)
    with pytest.raises(ValueError, match="rotary_dim must be at most head_dim 16, got 32"):
        apply_rotary_emb(x, *tables(32))
    with pytest.raises(ValueError, match="must have one shape"):
        apply_rotary_emb(x, cos, sin[:5])
    with pytest.raises(ValueError, match="rotary positions must be 0 to 39, got 35 to 43"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=35)
    with pytest.raises(ValueError, match="inplace must be False"):
        apply_rotary_emb(x, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="with cu_seqlens"):
        apply_rotary_emb(x, cos, sin, cu_seqlens=np.array([0, 9]))
