"""attention_probs: the matrix a call would have written, by the same arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, oracle
from support.case import Case, cases
from support.data import make_problem

from jax_flashattn import IntervalMask, attention_probs, flash_attention

EVERYTHING = {"softcap": 2.0, "alibi": "bh", "sinks": True, "dropout": 0.4}


@cases(
    Case(b=2, sq=20, sk=31, hq=6, hk=2, causal=True, left=9),
    grids.LENGTHS[2],
    grids.SEGMENTS[14],
    grids.COMBINED[4],
    grids.SCALES[3].replace(dtype="bfloat16"),
    Case(b=2, sq=20, sk=31, hq=6, hk=2, causal=True, bias="hij", **EVERYTHING),
    grids.SEGMENTS[14].replace(bias="b", **EVERYTHING),
    grids.LENGTHS[2].replace(**EVERYTHING),
)
def test_against_the_oracle(case):
    problem = make_problem(case)
    arguments = problem.mask_arguments()
    if "intervals" in arguments:
        arguments["mask"] = IntervalMask(*arguments.pop("intervals"))
    options = case.options()
    arrays = [problem.given[n] for n in ("query", "key", "value")]
    got, keep = attention_probs(*arrays, **arguments, **options, return_dropout_mask=True)
    assert got.shape == (case.b, case.hq, case.sq, case.sk)
    assert got.dtype == jnp.float32
    q, k = (problem.clean[n].astype(np.float64).swapaxes(1, 2) for n in ("query", "key"))
    k = np.repeat(k, case.hq // case.hk, axis=1)
    given, score = problem.features, problem.scale * (q @ k.swapaxes(2, 3))
    score = given.softcap * np.tanh(score / given.softcap) if given.softcap else score
    score = score + given.added(case.sk, np.float64)
    wanted, _ = oracle._softmax(score, problem.see[:, None], given.sinks)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert not np.asarray(got)[np.broadcast_to(~problem.see[:, None], got.shape)].any()
    assert np.array_equal(keep, np.ones(got.shape, bool) if given.keep is None else given.keep)


def test_times_value_it_is_the_output():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 30, 4, 16))
    options = {"causal": True, "window": (7, None), "scale": 0.7}
    out = jnp.einsum("bhqk,bkhd->bqhd", attention_probs(q, k, v, **options), v)
    np.testing.assert_allclose(out, flash_attention(q, k, v, **options), rtol=1e-4, atol=1e-5)


def test_with_its_dropout_mask_it_is_the_output():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 30, 4, 16))
    options = {"causal": True, "dropout_rate": 0.25, "dropout_key": jax.random.key(1)}
    options |= {"sinks": jnp.arange(4.0), "softcap": 3.0}
    p, keep = attention_probs(q, k, v, **options, return_dropout_mask=True)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(keep, p / 0.75, 0), v)
    np.testing.assert_allclose(out, flash_attention(q, k, v, **options), rtol=1e-4, atol=1e-5)


def test_it_checks_and_differentiates_like_the_call():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
    with pytest.raises(ValueError, match="must divide"):
        attention_probs(q, k[:, :, :0], v[:, :, :0])
    gradient = jax.grad(lambda q: (attention_probs(q, k, v, causal=True) ** 2).sum())(q)
    assert np.abs(gradient[:, 1:]).min() > 0
    assert not np.asarray(gradient[:, 0]).any(), "one visible key: its probability is 1"
