"""Real bugs of other projects in what is around a kernel: scratch, sizes, devices, merging.

Numbers are those of the list in docs/testing.md.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.case import Case, cases
from support.check import check_case, execute
from support.compare import assert_bitwise
from support.data import make_problem

from jax_flashattn import flash_attention, merge_partials


def _free_nan(*shapes):
    """Frees buffers full of NaN, which the next call may be given."""
    for x in [jnp.full(shape, jnp.nan) for shape in shapes]:
        x.block_until_ready().delete()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_repeatable_gradients_with_dirty_scratch_and_empty_tiles(dtype):
    """18, 27: flash-attention PR#1839, #1678, #1870, "varlen preprocess tile".

    Accumulators that some tasks never reach, because their rows see nothing, must be cleared too.
    """
    case = Case(b=2, sq=260, sk=190, hq=6, hk=2, dtype=dtype, causal=True, left=9,
                deterministic=True)  # fmt: skip
    problem, first = make_problem(case), check_case(case)
    for parts in (1, 2, 4, 8):
        _free_nan(*[(2, 2, parts, 190, 32)] * 3, (2, 260, 6, 16), (2, 190, 2, 16))
        for name, x in execute(problem, problem.given).items():
            assert_bitwise(name, x, first[name], case)


@cases(
    Case(b=70_000, sq=1, sk=2, d=8, dv=8, causal=True),
    Case(sq=2, sk=1, hq=70_000, hk=70_000, d=8, dv=8),
    Case(sq=70_000, sk=2, d=8, dv=8, left=1),
    Case(sq=2, sk=70_000, d=8, dv=8, right=0),
)
def test_more_than_16_bits_of_everything(case):
    """21: flash-attention#1786, pytorch#142228, #146704, xformers#845: 65,535 is not a limit.

    The first, the last and what is around 65,536 equal a call of their own.
    """
    problem = make_problem(case)
    query, key, value = (jnp.asarray(problem.given[n]) for n in ("query", "key", "value"))
    window = (case.left, case.right)
    gradient = jax.grad(lambda *x: _loss(*x, case.causal, window), (0, 1, 2))
    out = flash_attention(query, key, value, causal=case.causal, window=window)
    assert np.isfinite(out).all()
    axis = next((n for n, size in enumerate((case.b, case.sq, case.hq)) if size == 70_000), None)
    if axis in (0, 2):
        at = np.array([0, 1, 65_534, 65_535, 65_536, 65_537, 69_999])
        some = [jnp.take(x, at, axis=axis) for x in (query, key, value)]
        for a, b in zip(gradient(query, key, value), gradient(*some)):
            np.testing.assert_allclose(jnp.take(a, at, axis=axis), b, rtol=1e-5, atol=1e-5)
        alone = flash_attention(*some, causal=case.causal, window=window)
        np.testing.assert_allclose(jnp.take(out, at, axis=axis), alone, rtol=1e-5, atol=1e-6)
    elif axis == 1:  # off = 2 - 70,000: all rows but the last two see both keys
        early = jnp.concatenate([query[:, :1], query[:, 65_530:65_540]], axis=1)
        alone = flash_attention(early, key, value)
        found = jnp.concatenate([out[:, :1], out[:, 65_530:65_540]], axis=1)
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    else:  # row 0 sees all keys but the last, row 1 all of them
        short = flash_attention(query[:, :1], key[:, :-1], value[:, :-1])
        np.testing.assert_allclose(out[:, :1], short, rtol=1e-5, atol=1e-6)


def _loss(query, key, value, causal, window):
    return (flash_attention(query, key, value, causal=causal, window=window) ** 2).sum()


@pytest.mark.parametrize(
    "documents", [((1,),), ((97,), (1, 3)), ((64, 1), (2,), (30, 66))], ids=str
)
def test_uneven_documents_in_batches_of_one_to_three(documents):
    """24: flash-attention PR#2333: work behind the last document reads nothing of the next."""
    case = Case(b=len(documents), sq=97, sk=97, hq=2, layout="segments", lengths_q=documents,
                causal=True, poison="tail", dlse=True)  # fmt: skip
    check_case(case)


def test_two_calls_one_in_a_scan_and_constants():
    """34: jax#36580: scratch of one call must not be memory that another, or a constant, owns."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, 40, 2, 16)), jnp.float32)
                         for _ in range(3))  # fmt: skip

    def step(x, _):
        return jax.grad(lambda y: _loss(y, key, value, True, None))(x), None

    @jax.jit
    def both(x):
        scanned = jax.lax.scan(step, x, length=3)[0]
        return (
            scanned,
            jax.grad(lambda k: _loss(x, k, value, False, (5, 0)))(key),
            key + 0,
            value + 0,
        )

    scanned, gradient, *constants = both(query)
    x = query
    for _ in range(3):
        x = step(x, None)[0]
    np.testing.assert_allclose(scanned, x, rtol=1e-4, atol=1e-6)
    alone = jax.grad(lambda k: _loss(query, k, value, False, (5, 0)))(key)
    np.testing.assert_allclose(gradient, alone, rtol=1e-5, atol=1e-6)
    assert_bitwise("key", constants[0], key)
    assert_bitwise("value", constants[1], value)


def test_the_second_device_alone_and_both_at_once():
    """35: NVIDIA/warp#976, PR#1181: a call runs where its arrays are."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 50, 2, 16)).astype(np.float32)
    run = jax.jit(lambda x: flash_attention(x, x, x, causal=True))
    results = [run(jax.device_put(x * n, jax.devices("cpu")[n])) for n in (2, 1)]
    assert [next(iter(r.devices())).id for r in results] == [2, 1]
    for n, r in zip((2, 1), results):
        assert_bitwise("out", np.asarray(r), np.asarray(run(x * n)))


def test_merging_any_subset_of_empty_parts():
    """40: ring-flash-attention PR#30, PR#34: exp(-inf - -inf) of parts that a row does not see."""
    rng = np.random.default_rng(0)
    outs = rng.standard_normal((4, 1, 1, 1, 3)).astype(np.float32)
    lses = rng.standard_normal((4, 1, 1, 1)).astype(np.float32) * 200
    for empty in itertools.product((False, True), repeat=4):
        given = np.where(np.array(empty)[:, None, None, None], -np.inf, lses)
        poisoned = np.where(np.array(empty)[:, None, None, None, None], np.nan, outs)
        (out, lse), pullback = jax.vjp(merge_partials, jnp.asarray(poisoned), jnp.asarray(given))
        left = ~np.array(empty)
        weights = np.exp(lses[left] - lses[left].max(initial=-np.inf)).astype(float)
        if not left.any():
            assert not np.asarray(out).any()
            assert np.isneginf(lse).all()
        else:
            total = weights.sum(0)
            wanted = (weights[..., None] * outs[left]).sum(0) / total
            np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(lse, lses[left].max(0) + np.log(total), rtol=1e-6)
        gradients = pullback((jnp.ones_like(out), jnp.ones_like(lse)))
        assert all(np.isfinite(g).all() for g in gradients)
        assert not np.asarray(gradients[0])[~left].any()
