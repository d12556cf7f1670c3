"""Differentiation inside jax's control flow and rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo
from support.compare import assert_bitwise

from jax_flashattn import IntervalMask, flash_attention

RNG = np.random.default_rng(0)
SIZES = ((7, 4), (11, 2), (11, 2))
Q, K, V = (jnp.asarray(RNG.standard_normal((2, s, h, 8)), jnp.float32) for s, h in SIZES)
policies = jax.checkpoint_policies


def attend(q, k, v, **options):
    return flash_attention(q, k, v, causal=True, **options)


def block(x, k, v):
    """One layer: attention output back to the shape of the query."""
    return x + jnp.tanh(attend(x, k, v))


def loss(q, k, v):
    return (block(q, k, v) ** 2).sum()


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6)


def test_zero_and_symbolic_zero_cotangents():
    (_, lse), pullback = jax.vjp(lambda *x: attend(*x, return_lse=True), Q, K, V)
    zeros = pullback((jnp.zeros_like(Q), jnp.zeros_like(lse)))
    assert not any(np.asarray(x).any() for x in zeros)
    only_out = jax.grad(lambda q: attend(q, K, V, return_lse=True)[0].sum())(Q)
    assert_close(only_out, jax.grad(lambda q: attend(q, K, V).sum())(Q))
    only_lse = jax.grad(lambda q: attend(q, K, V, return_lse=True)[1].sum())(Q)
    assert np.abs(only_lse).max() > 1e-2


def test_nan_cotangents_stay_in_their_row():
    _, pullback = jax.vjp(lambda *x: attend(*x), Q, K, V)
    dq, _, _ = pullback(jnp.zeros_like(Q).at[0, 3].set(jnp.nan))
    assert np.isnan(dq[0, 3]).all()
    assert not np.delete(np.asarray(dq), 3, axis=1).any()


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_one_argument_at_a_time(argument):
    every = jax.grad(loss, (0, 1, 2))(Q, K, V)
    assert_close(jax.grad(loss, argument)(Q, K, V), every[argument])


def test_jacobian_is_that_of_the_reference():
    q, k, v = Q[:1, :3, :2], K[:1, :4, :1], V[:1, :4, :1]

    def jacobian(implementation):
        run = functools.partial(attend, return_lse=True, implementation=implementation)
        return jax.jit(jax.jacrev(run, (0, 1, 2)))(q, k, v)

    assert_close(jacobian("kernel"), jacobian("reference"))


def test_the_reference_has_forward_mode_and_hessians():
    """Forward over reverse against a difference of gradients; the kernels have only reverse."""

    def f(q):
        return (attend(q, K, V, implementation="reference") ** 2).sum()

    direction = jnp.asarray(RNG.standard_normal(Q.shape), jnp.float32)
    value, tangent = jax.jvp(f, (Q,), (direction,))
    np.testing.assert_allclose(value, (attend(Q, K, V) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(tangent, (jax.grad(f)(Q) * direction).sum(), rtol=1e-4)
    product = jax.jvp(jax.grad(f), (Q,), (direction,))[1]
    step = 1e-2
    difference = jax.grad(f)(Q + step * direction) - jax.grad(f)(Q - step * direction)
    np.testing.assert_allclose(product, difference / (2 * step), rtol=2e-2, atol=2e-3)


def test_value_and_grad_with_aux():
    def with_aux(q):
        out, lse = attend(q, K, V, return_lse=True)
        return out.sum(), lse

    (value, lse), gradient = jax.jit(jax.value_and_grad(with_aux, has_aux=True))(Q)
    assert_close((value, lse), (attend(Q, K, V).sum(), attend(Q, K, V, return_lse=True)[1]))
    assert_close(gradient, jax.grad(lambda q: attend(q, K, V).sum())(Q))


SAVE_NAMES = policies.save_only_these_names("attention_out", "attention_lse")
POLICIES = (  # policy, how many of the two loops, forward and backward, run the forward kernel
    (None, 2),
    (policies.nothing_saveable, 2),
    (policies.dots_saveable, 2),
    (policies.everything_saveable, 1),
    (SAVE_NAMES, 1),
    (policies.save_only_these_names("attention_out"), 2),
    (policies.save_any_names_but_these("something_else"), 1),
)


@pytest.mark.parametrize(("policy", "forward_calls"), POLICIES)
def test_checkpoint_policies_over_scanned_layers(policy, forward_calls):
    """Saving both named residuals is what keeps the forward from running again."""
    keys, values = (jnp.stack([x, 0.5 * x, -x]) for x in (K, V))

    def scanned(q, keys, values):
        body = jax.checkpoint(lambda x, kv: (block(x, *kv), None), policy=policy)
        return (jax.lax.scan(body, q, (keys, values))[0] ** 2).sum()

    def unrolled(q, keys, values):
        for n in range(3):
            q = block(q, keys[n], values[n])
        return (q**2).sum()

    run = jax.jit(jax.value_and_grad(scanned, (0, 1, 2)))
    wanted = jax.jit(jax.value_and_grad(unrolled, (0, 1, 2)))(Q, keys, values)
    assert_close(run(Q, keys, values), wanted)
    text = hlo.compiled_text(run, Q, keys, values)
    hlo.assert_kernels(text, forward=forward_calls, backward=1)


def test_plain_gradient_runs_each_kernel_once():
    text = hlo.compiled_text(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), Q, K, V)
    hlo.assert_kernels(text, forward=1, backward=1)


def test_scan_with_closed_over_keys():
    def scanned(q, k):
        return jax.lax.scan(lambda x, _: (block(x, k, V), None), q, None, length=3)[0].sum()

    def unrolled(q, k):
        for _ in range(3):
            q = block(q, k, V)
        return q.sum()

    assert_close(jax.grad(scanned, (0, 1))(Q, K), jax.grad(unrolled, (0, 1))(Q, K))


def test_while_loop():
    def body(state):
        n, x = state
        return n + 1, block(x, K, V)

    run = jax.jit(lambda x: jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1])
    assert_close(run(Q), functools.reduce(lambda x, _: block(x, K, V), range(3), Q))


@pytest.mark.parametrize("choice", [False, True])
def test_cond(choice):
    def chosen(flag, q):
        return jax.lax.cond(
            flag, lambda x: block(x, K, V), lambda x: attend(x, K, V, window=(2, 0)), q
        ).sum()

    run = jax.jit(jax.grad(chosen, 1))
    plain = (lambda q: block(q, K, V)) if choice else (lambda q: attend(q, K, V, window=(2, 0)))
    assert_close(run(choice, Q), jax.grad(lambda q: plain(q).sum())(Q))


def test_donated_and_aliased_arguments():
    wanted = np.asarray(loss(Q, K, K))
    run = jax.jit(lambda q, k, v: (block(q, k, v), k), donate_argnums=(0, 1))
    out, _ = run(Q + 0, K + 0, K)
    np.testing.assert_allclose((out**2).sum(), wanted, rtol=1e-5)


def test_ahead_of_time_compilation():
    compiled = jax.jit(attend).lower(Q, K, V).compile()
    assert_bitwise("out", compiled(Q, K, V), attend(Q, K, V))


def _everything(q, k, v):
    """Values and gradients with rows that see nothing, lengths, segments and a mask."""
    ids = jnp.asarray([[1, 1, 0, 2, 2, 2, 0]] * 2, jnp.int32)
    lengths = jnp.array([3, 7], jnp.int32)
    mask = IntervalMask(ids - 1, ids + 2)
    out, lse = attend(q, k[:, :4], v[:, :4], return_lse=True)
    gradients = [
        jax.grad(lambda x: (attend(x, k[:, :4], v[:, :4]) ** 2).sum())(q),
        jax.grad(lambda x: attend(x, x, x, segment_ids=ids, lengths=lengths).sum())(q),
        jax.grad(lambda x: attend(x, k, v, lengths=(lengths, lengths), mask=mask).sum())(q),
    ]
    return out, lse, gradients


def test_debug_nans_and_strict_dtype_promotion():
    """-inf in lse and clamped limits are no NaN; nothing inside relies on implicit dtypes."""
    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        out, lse, gradients = _everything(Q, K, V)
    assert np.isneginf(lse[:, :, :3]).all()
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in gradients)


def test_rank_promotion_may_be_forbidden():
    with jax.numpy_rank_promotion("raise"):
        strict = jax.jit(_everything)(Q, K, V)
    assert_close(strict, jax.jit(_everything)(Q, K, V))
