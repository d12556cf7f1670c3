"""Caches on CUDA: our append writes what the scatter writes, in place, and decoding agrees."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.test_attention import platform, put  # noqa: F401  the fixture
from support import hlo

from jax_flashattn import _native, flash_attn_with_kvcache
from jax_flashattn._append import append, append_by_scatter

B, N, BLOCKS, SIZE = 3, 5, 7, 16
TABLES = (None, [[4], [0], [6]], [[4, 1], [0, 2], [6, 5]], [[-1, 3], [2**31 - 1, 0], [7, -9]])
STARTS = ((0, 3, 11), (11, 12, 16), (2**31 - 1, 14, 40), (14, 20, 27))
# Rows of whole 16-byte units, and rows that are not.
TAILS = (("bfloat16", (2, 64)), ("float32", (3, 8)), ("bfloat16", (1, 3)), ("int8", (5,)))


def same_bits(x, y):
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def arrays(dtype, tail):
    rng = np.random.default_rng(0)
    cache, new = (rng.integers(0, 100, (*s, *tail)) for s in ((BLOCKS, SIZE), (B, N)))
    return jnp.asarray(cache, dtype), jnp.asarray(new, dtype)


@pytest.mark.parametrize(("dtype", "tail"), TAILS)
def test_append(dtype, tail, platform):  # noqa: F811
    for table, start in itertools.product(TABLES, STARTS):
        ids = None if table is None else jnp.array(table, jnp.int32)
        given = (*arrays(dtype, tail), jnp.array(start, jnp.int32), ids)
        wanted = jax.jit(append_by_scatter)(*given)
        moved = [None if x is None else put(platform, x)[0] for x in given]
        same_bits(jax.jit(append)(*moved), wanted)
        same_bits(moved[0], given[0])  # not donated: as it was


def test_many_rows(platform):  # noqa: F811
    """More rows than blocks of a grid."""
    rng = np.random.default_rng(0)
    new = jnp.asarray(rng.integers(0, 100, (3, 30000, 8)), jnp.bfloat16)
    cache, start = jnp.zeros((3, 30010, 8), jnp.bfloat16), jnp.array([0, 9, 20], jnp.int32)
    wanted = jax.jit(append_by_scatter)(cache, new, start, None)
    same_bits(jax.jit(append)(*put(platform, cache, new, start), None), wanted)


def _steps(loop, q, caches, new, lengths, table):
    def step(carry, _=None):
        caches, n, q = carry
        out, *caches = flash_attn_with_kvcache(
            q, *caches, new, new, cache_seqlens=n, causal=True, block_table=table
        )
        return (tuple(caches), n + 1, out), None

    start = (tuple(caches), lengths, q)
    return jax.lax.scan(step, start, length=6)[0] if loop else step(start)[0]


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_decoding_agrees_with_the_cpu_and_copies_nothing(paged, loop, platform):  # noqa: F811
    rng = np.random.default_rng(0)
    b, hq, hk, d, capacity = 3, 8, 2, 64, 256
    table = rng.permutation(b * capacity // SIZE).reshape(b, -1).astype(np.int32)
    shape = (table.size, SIZE, hk, d) if paged else (b, capacity, hk, d)
    q, k, v, new = (
        jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
        for s in ((b, 1, hq, d), shape, shape, (b, 1, hk, d))
    )
    given = (q, (k, v), new, jnp.array([5, 100, 0], jnp.int32), table if paged else None)
    run = jax.jit(functools.partial(_steps, loop), donate_argnums=1)
    wanted = run(*jax.tree.map(jnp.copy, given))
    moved = jax.device_put(given, jax.devices(platform)[0])
    text = run.lower(*moved).compile().as_text()
    assert hlo.count_calls(text, _native.APPEND) == 2
    (caches, lengths, out) = run(*moved)
    assert all(x.is_deleted() for x in moved[1]), "donated"
    np.testing.assert_array_equal(lengths, wanted[1])
    for x, y in zip(caches, wanted[0]):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))
    limit = 0.1 if loop else 0.02  # each step's query is the output before, in bfloat16
    np.testing.assert_allclose(out.astype(np.float32), wanted[2].astype(np.float32), atol=limit)
