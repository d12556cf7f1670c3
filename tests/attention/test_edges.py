"""The contract for the edges: empty sizes, empty rows, nonsense masks, and where NaN may go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.case import Case, cases
from support.check import GRADIENTS, check_case, execute
from support.compare import assert_bitwise, assert_same_numbers
from support.data import make_problem

from jax_flashattn import IntervalMask, flash_attention

EMPTY = Case(b=2, sq=5, sk=7, hq=4, hk=2, dlse=True)
HIDDEN = (  # layouts in which some positions are used by nobody
    Case(b=2, sq=70, sk=130, hq=4, hk=2, layout="lengths", lengths_q=(66, 3), lengths_k=(120, 1)),
    Case(b=1, sq=150, sk=150, hq=2, layout="segments", lengths_q=((-3, 70, -1, 40),)),
    Case(b=2, sq=90, sk=99, hq=2, interval="random"),
    Case(b=2, sq=20, sk=200, hq=2, left=3, right=3),
)
NAN = Case(sq=130, sk=200, hq=2, d=24, dv=24, dlse=True)


@cases(
    *(EMPTY.replace(**{name: 0}, causal=causal) for name in ("b", "sq", "sk") for causal in
      (False, True)),
    EMPTY.replace(hq=0, hk=0),
    EMPTY.replace(hq=0, hk=2),
    EMPTY.replace(sq=0, sk=0, dtype="bfloat16"),
    EMPTY.replace(sk=0, layout="lengths", lengths_q=(5, 5), lengths_k=(3, 0)),
    EMPTY.replace(sq=0, sk=0, layout="segments", lengths_q=((), ())),
    EMPTY.replace(sk=0, layout="segments", lengths_q=((3,), (5,)), lengths_k=((), ())),
    EMPTY.replace(layout="lengths", lengths_q=(0, 0)).replace(sk=5),
    EMPTY.replace(layout="segments", lengths_q=((), ()), lengths_k=((), ())),
)  # fmt: skip
def test_empty_sizes(case):
    results = check_case(case)
    if case.sk == 0:
        assert np.isneginf(results["lse"]).all()
        assert not results["out"].astype(float).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("d", [1, 16, 256])
def test_one_token(d, dtype):
    results = check_case(Case(sq=1, sk=1, d=d, dv=d, dtype=dtype, causal=True, dlse=True))
    problem = make_problem(Case(sq=1, sk=1, d=d, dv=d, dtype=dtype, causal=True, dlse=True))
    out, value = results["out"].astype(float), problem.given["value"].astype(float)
    np.testing.assert_allclose(out, value, rtol=1e-15 if dtype == "float64" else 0)


@cases(
    Case(sq=200, sk=3, hq=2, causal=True, dlse=True),
    Case(sq=3, sk=200, hq=2, right=0, left=0, dlse=True),
    Case(b=3, sq=66, sk=66, hq=2, layout="lengths", lengths_q=(66, 1, 65), causal=True, dlse=True),
    Case(b=2, sq=66, sk=66, layout="segments", lengths_q=((-66,), (10, -50)), dlse=True),
    Case(sq=130, sk=66, hq=2, interval="wild", dlse=True),
)
def test_rows_that_see_nothing(case):
    """S11: out 0, lse -inf, dq 0 and no share in dk, dv: exact zeros are part of check_case."""
    results = check_case(case)
    dlse_of_empty = make_problem(case)
    huge = np.where(np.isneginf(results["lse"]), np.inf, dlse_of_empty.given["dlse"])
    again = execute(dlse_of_empty, dlse_of_empty.given | {"dlse": huge.astype(np.float32)})
    for name in GRADIENTS:
        assert_bitwise(name, again[name], results[name], case)


@pytest.mark.parametrize("traced", [False, True])
def test_nonsense_lengths_are_clamped(traced):
    problem = make_problem(Case(b=4, sq=20, sk=30, hq=2))
    args = [jnp.asarray(problem.given[n]) for n in ("query", "key", "value")]

    def call(lengths):
        return flash_attention(*args, lengths=lengths, causal=True, return_lse=True)

    run = jax.jit(call) if traced else call
    nonsense = tuple(
        jnp.array(x, jnp.int32) for x in ([-7, 99, 2**31 - 1, 5], [3, 2**31 - 1, -(2**31), 1000000])
    )
    sane = tuple(jnp.array(x, jnp.int32) for x in ([0, 20, 20, 5], [3, 30, 0, 30]))
    for name, a, b in zip(("out", "lse"), run(nonsense), run(sane)):
        assert_bitwise(name, a, b)


def test_nonsense_intervals_read_nothing_outside():
    problem = make_problem(Case(sq=6, sk=9, hq=2))
    args = [jnp.asarray(problem.given[n]) for n in ("query", "key", "value")]
    lo = jnp.array([[-(2**31), 2**31 - 1, 8, 5, 0, 9]], jnp.int32)
    hi = jnp.array([[2**31 - 1, -(2**31), 2**31 - 1, 5, -1, 12]], jnp.int32)
    out, lse = flash_attention(*args, mask=IntervalMask(lo, hi), return_lse=True)
    whole = flash_attention(*args)
    np.testing.assert_allclose(out[:, 0], whole[:, 0], rtol=1e-6)
    assert_bitwise("one key", out[:, 2], np.asarray(args[2])[:, 8].repeat(2, axis=1))
    empty = np.isneginf(np.asarray(lse[0, 0]))
    assert empty.tolist() == [False, True, False, True, True, True]
    assert not np.asarray(out)[:, empty].any()


@cases(*(case.replace(poison="invisible", dlse=True) for case in HIDDEN))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_what_nobody_uses_has_no_effect(case, dtype, causal):
    """S13: the clean run's results, and the same of infinities."""
    case = case.replace(dtype=dtype, causal=causal)
    problem = make_problem(case)
    assert any(np.isnan(x.astype(float)).any() for x in problem.given.values()), "vacuous"
    clean = execute(problem, problem.clean)
    for bad in (np.nan, np.inf, -np.inf):
        given = {
            n: np.where(np.isnan(x.astype(float)), x.dtype.type(bad), x)
            for n, x in problem.given.items()
        }
        poisoned = execute(problem, given)
        for name, x in clean.items():
            assert_same_numbers(name, poisoned[name], x, dtype, case)


def _spoil(problem, name, where, bad):
    x = problem.given[name].copy()
    x[where] = bad
    return problem.given | {name: x}


def _assert_nan(results, rows_q, rows_k):
    """NaN in all of these rows and keys, nowhere else."""
    for name, rows in (("out", rows_q), ("dq", rows_q), ("dk", rows_k), ("dv", rows_k)):
        bad = np.isnan(results[name].astype(float))
        has = bad.any((0, 2, 3))
        assert set(np.flatnonzero(has)) <= set(rows), f"{name}: NaN leaks to {np.flatnonzero(has)}"
    bad = np.isnan(results["out"].astype(float)).all((0, 2, 3))
    assert set(np.flatnonzero(bad)) == set(rows_q), "NaN is lost in out"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_and_inf_in_a_query_stay_in_its_row(causal, dtype, bad):
    """Scores of an infinite query are of both signs, or inf - inf: its row is NaN too."""
    problem = make_problem(NAN.replace(dtype=dtype, causal=causal))
    results = execute(problem, _spoil(problem, "query", (0, 50), bad))
    seen = np.flatnonzero(problem.see[0, 50])
    _assert_nan(results, [50], seen)
    assert np.isnan(results["lse"][0, :, 50]).all()
    assert np.isfinite(np.delete(results["lse"], 50, axis=2)).all()


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_nan_and_inf_in_a_key_stay_with_the_rows_that_see_it(dtype, bad, name):
    problem = make_problem(NAN.replace(dtype=dtype, causal=True, left=60))
    spoiled = _spoil(problem, name, (0, 120), bad)
    results = execute(problem, spoiled)
    clean = execute(problem, problem.given)
    rows = np.flatnonzero(problem.see[0, :, 120])
    others = np.setdiff1d(np.arange(problem.case.sq), rows)
    for field, axis in (("out", 1), ("dq", 1), ("lse", 2)):
        same = np.take(results[field], others, axis), np.take(clean[field], others, axis)
        assert_same_numbers(field, *same, dtype, problem.case)
    if np.isnan(bad):
        assert np.isnan(results["out"].astype(float)[0, rows]).all((1, 2)).all()
    untouched = np.flatnonzero(~problem.see[0][rows].any(0))
    for field in ("dk", "dv"):
        same = results[field][:, untouched], clean[field][:, untouched]
        assert_same_numbers(field, *same, dtype, problem.case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["query", "key", "value", "dout"])
def test_nan_in_a_document_does_not_reach_its_neighbours(name, dtype):
    """S13 on CPU: documents that share tiles stay apart, forward and backward."""
    documents = (30, 41, 50)
    case = Case(
        sq=121, sk=121, hq=4, hk=2, layout="segments", lengths_q=(documents,), dtype=dtype,
        causal=True, dlse=True,
    )  # fmt: skip
    problem = make_problem(case)
    clean = execute(problem, problem.given)
    spoiled = execute(problem, _spoil(problem, name, (0, slice(30, 71)), np.nan))
    others = np.r_[0:30, 71:121]
    for field, x in clean.items():
        axis = 2 if field == "lse" else 1
        same = np.take(spoiled[field], others, axis), np.take(x, others, axis)
        assert_same_numbers(field, *same, dtype, case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_large_negative_scale_does_not_overflow(dtype):
    """The maximum is that of scaled scores: that of raw ones would leave exp(2 * 300)."""
    results = check_case(Case(sq=70, sk=130, scale=-60.0, dtype=dtype, causal=True, dlse=True))
    assert np.abs(results["lse"][np.isfinite(results["lse"])]).max() > 300, "vacuous"


def test_infinity_follows_ieee():
    """One key with value +inf: rows that give it weight are +inf, a -inf score gives weight 0."""
    case = Case(sq=4, sk=70, d=4, dv=3, data="integer")
    problem = make_problem(case)
    given = {n: np.ones_like(problem.given[n]) for n in ("query", "key", "value")}
    value = given["value"].copy()
    value[0, 5] = np.inf
    out = flash_attention(given["query"], given["key"], value)
    assert np.isposinf(np.asarray(out)).all()
    key = given["key"].copy()
    key[0, 5] = -np.inf
    out, lse = flash_attention(given["query"], key, given["value"], return_lse=True)
    np.testing.assert_allclose(out, np.ones((1, 4, 1, 3)), rtol=1e-6)
    np.testing.assert_allclose(lse, np.full((1, 1, 4), 2 + np.log(69)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_an_infinite_key_of_no_weight_has_finite_gradients(dtype):
    """A score of -inf is weight 0: nothing of that key's reaches dv, whatever pads a tile of rows.

    Its dq is 0 * inf = NaN, as IEEE has it, in every row.
    """
    problem = make_problem(Case(sq=5, sk=70, d=4, dv=16, dtype=dtype))
    query = np.abs(problem.given["query"]) + np.ones((), problem.given["query"].dtype)
    key = problem.given["key"].copy()
    key[0, 5] = -np.inf
    results = execute(problem, problem.given | {"query": query, "key": key})
    np.testing.assert_array_equal(results["dv"][0, 5].astype(float), 0)
    assert np.isfinite(results["dv"].astype(float)).all()
    assert np.isfinite(results["out"].astype(float)).all()


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_padding_never_leaks_in_either_implementation(where, implementation):
    """S13 for the gradients of the whole call, padding behind lengths being NaN."""
    problem = make_problem(Case(b=2, sq=20, sk=20, hq=2))
    clean = [jnp.asarray(problem.given[n]) for n in ("query", "key", "value")]
    at = ("query", "key", "value").index(where)
    spoiled = list(clean)
    spoiled[at] = clean[at].at[:, 13:].set(jnp.nan)
    lengths = jnp.array([13, 9], jnp.int32)

    def loss(q, k, v):
        out = flash_attention(q, k, v, lengths=lengths, causal=True, implementation=implementation)
        return (out[:, :13] ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    for name, a, b in zip(GRADIENTS, gradient(*spoiled), gradient(*clean)):
        assert_same_numbers(name, a, b, "float32")
