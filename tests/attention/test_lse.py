"""S10: the log-sum-exp is a value, with -inf by position, and has a true gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.case import Case, cases
from support.check import check_case, execute
from support.compare import assert_bitwise
from support.data import make_problem

from jax_flashattn import flash_attention

CASES = (
    Case(b=2, sq=60, sk=100, hq=4, hk=2, causal=True, dlse=True),
    Case(b=2, sq=100, sk=60, hq=4, hk=2, causal=True, dlse=True),
    Case(b=2, sq=65, sk=65, hq=2, layout="lengths", lengths_q=(65, 9), left=4, dlse=True),
)


@cases(*(case.replace(dtype=t) for case in CASES for t in ("bfloat16", "float16", "float64")))
def test_cotangents_of_out_and_lse(case):
    check_case(case)


@cases(*CASES)
def test_cotangent_of_lse_alone(case):
    """The gradient is that of logsumexp, written here directly: P, not P * (dP - delta)."""
    problem = make_problem(case)
    given = problem.given | {"dout": np.zeros_like(problem.given["dout"])}
    results = execute(problem, given)
    q, k, dlse = (given[n].astype(float) for n in ("query", "key", "dlse"))
    k = np.repeat(k, case.hq // case.hk, axis=2)
    score = np.einsum("bihd,bjhd->bhij", q, k) * problem.scale
    see = np.broadcast_to(problem.see[:, None], score.shape)
    lse = np.where(np.isfinite(results["lse"]), results["lse"], 0)[..., None]
    ds = np.where(see, np.exp(score - lse), 0) * dlse[..., None] * problem.scale
    np.testing.assert_allclose(
        results["dq"], np.einsum("bhij,bjhd->bihd", ds, k), rtol=1e-4, atol=2e-6
    )
    dk = np.einsum("bhij,bihd->bjhd", ds, q)
    dk = dk.reshape(case.b, case.sk, case.hk, -1, case.d).sum(3)
    np.testing.assert_allclose(results["dk"], dk, rtol=1e-4, atol=5e-6)
    assert not results["dv"].any()


@cases(*CASES)
def test_rows_that_see_nothing_are_minus_infinity(case):
    lse = check_case(case)["lse"]
    nothing = np.broadcast_to(~make_problem(case).see.any(2)[:, None], lse.shape)
    assert np.array_equal(np.isneginf(lse), nothing)
    assert np.isfinite(lse[~nothing]).all()


def test_it_is_the_natural_logarithm():
    q, k = jnp.zeros((1, 3, 2, 8)), jnp.zeros((1, 50, 1, 8))
    _, lse = flash_attention(q, k, k, return_lse=True)
    np.testing.assert_allclose(lse, np.full((1, 2, 3), np.log(50)), rtol=1e-6)


def test_it_does_not_change_the_output():
    problem = make_problem(CASES[0])
    args = [problem.given[n] for n in ("query", "key", "value")]
    out, lse = flash_attention(*args, causal=True, return_lse=True)
    assert_bitwise("out", out, flash_attention(*args, causal=True))
    assert lse.dtype == jnp.float32
    assert lse.shape == (2, 4, 60)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_z_loss_matches_the_reference(dtype):
    """A loss of both results, through the public gradient, on kernel and reference."""
    x = make_problem(CASES[0].replace(dtype=dtype)).given

    def loss(q, k, v, implementation):
        out, lse = flash_attention(
            q, k, v, causal=True, return_lse=True, implementation=implementation
        )
        return (out.astype(jnp.float32) ** 2).sum() + 1e-2 * (lse**2).sum()

    args = [jnp.asarray(x[n]) for n in ("query", "key", "value")]
    kernel, reference = (
        jax.grad(loss, argnums=(0, 1, 2))(*args, implementation)
        for implementation in (None, "reference")
    )
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for a, b in zip(kernel, reference):
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
