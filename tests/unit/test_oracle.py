"""The oracle itself: its gradients against finite differences of its forward, its masks by hand."""

import dataclasses

import numpy as np
import pytest
from support import compare, oracle
from support.case import Case, cases, parse
from support.data import make_problem

CASES = (
    Case(b=2, sq=5, sk=9, hq=4, hk=2, d=3, dv=6, dtype="float64", causal=True, dlse=True),
    Case(b=1, sq=9, sk=4, hq=3, d=3, dv=2, dtype="float64", causal=True, left=2, dlse=True),
    Case(sq=9, sk=9, dtype="float64", layout="segments", lengths_q=((4, -1, 3),), dlse=True),
    Case(b=2, sq=6, sk=8, dtype="float64", scale=-0.4, interval="random", dlse=True),
    Case(b=2, sq=6, sk=9, hq=4, hk=2, dtype="float64", causal=True, dlse=True, softcap=0.7,
         alibi="bh", sinks=True, dropout=0.3, bias="hj"),
)  # fmt: skip


@cases(*CASES)
def test_gradients_are_derivatives(case):
    problem, rng, step = make_problem(case), np.random.default_rng(3), 1e-6
    x = problem.clean

    def objective(arrays):
        learned = {n: arrays[n] for n in ("bias", "sinks") if n in arrays}
        features = dataclasses.replace(problem.features, **learned)
        results = oracle.attention(arrays, problem.see, problem.scale, features)
        finite = np.isfinite(results["lse"])
        return (results["out"] * x["dout"]).sum() + (results["lse"] * x["dlse"])[finite].sum()

    gradients = oracle.attention(x, problem.see, problem.scale, problem.features)
    pairs = [("query", "dq"), ("key", "dk"), ("value", "dv")]
    if case.sinks:
        x = x | {"bias": problem.features.bias, "sinks": problem.features.sinks}
        pairs += [("bias", "dbias"), ("sinks", "dsinks")]
    for name, gradient in pairs:
        direction = rng.standard_normal(x[name].shape)
        ahead, behind = (
            objective(x | {name: x[name] + sign * step * direction}) for sign in (1, -1)
        )
        wanted = (gradients[gradient] * direction).sum()
        assert (ahead - behind) / (2 * step) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def _picture(case, **arrays):
    see = oracle.visible(case, oracle.Mask(**arrays))[0]
    return ["".join("x" if s else "." for s in row) for row in see]


def test_masks_as_pictures():
    """S1, S2 and S6 drawn by hand."""
    assert _picture(Case(sq=2, sk=4, causal=True)) == ["xxx.", "xxxx"]
    assert _picture(Case(sq=4, sk=2, causal=True)) == ["..", "..", "x.", "xx"]
    assert _picture(Case(sq=3, sk=4, left=1, right=0)) == ["xx..", ".xx.", "..xx"]
    ids = np.array([[1, 1, 0, 2, 2, 1]])
    assert _picture(Case(sq=6, sk=6, causal=True), ids_q=ids, ids_k=ids) == [
        *("x.....", "xx....", "......", "...x..", "...xx.", ".....x"),
    ]
    keys = np.array([[2, 1, 1, 1]])
    assert _picture(Case(sq=6, sk=4, causal=True), ids_q=ids, ids_k=keys) == [
        *(".xx.", ".xxx", "....", "....", "x...", "...."),
    ]


def test_low_precision_is_near_but_not_equal():
    problem = make_problem(Case(sq=20, sk=30, dtype="bfloat16"))
    exact, low = (
        oracle.attention(problem.clean, problem.see, problem.scale, low=low) for low in (0, 1)
    )
    for name, x in exact.items():
        error = np.linalg.norm(low[name] - x) / np.linalg.norm(x)
        assert 1e-4 < error < 2e-2, name


def test_a_repr_is_the_case():
    case = CASES[1].replace(poison="invisible", scale=0.0)
    assert parse(repr(case)) == case
    assert repr(Case()) == "Case()"


@pytest.mark.parametrize("damage", ["row", "scale", "nan", "hole", "dtype", "one"])
def test_comparison_notices(damage):
    """Each rule of the policy fails on the damage it is there for."""
    problem = make_problem(Case(b=2, sq=60, sk=60, hq=2, dtype="bfloat16"))
    exact = oracle.attention(problem.clean, problem.see, problem.scale)["out"]
    low = oracle.attention(problem.clean, problem.see, problem.scale, low=True)["out"]
    x = exact.astype(problem.clean["query"].dtype)
    tiny = exact.copy()
    if damage == "row":  # a zeroed row that is small against the largest error allowed elsewhere
        tiny[0, 7] *= 1e-1
        exact, low = tiny, low * np.where(tiny == exact, 1, 1e-1)
        x = exact.astype(x.dtype)
        x[0, 7] = 0
    elif damage == "scale":
        x = (exact * 1.03).astype(x.dtype)
    elif damage == "nan":
        x[0, 0, 0, 0] = np.nan
    elif damage == "hole":
        x[1, 2, 1, 3] = -np.inf
    elif damage == "dtype":
        x = x.astype(np.float16)
    elif damage == "one":
        x[1, 59, 1, 15] += np.array(0.1, x.dtype)
    with pytest.raises(AssertionError):
        _compare(x, exact, low)
    _compare(exact.astype(problem.clean["query"].dtype), exact, low)


def _compare(x, exact, low):
    compare.assert_structure("out", x, exact, "bfloat16", "here")
    compare.assert_numbers("out", x, exact, low, "bfloat16", 2, 0.0, "here")


def test_failures_say_where_and_how_to_rerun():
    x = np.zeros((2, 3), np.float32)
    wanted = np.array([[0, 0, 0], [0, 0, 5.0]])
    with pytest.raises(AssertionError, match=r"(?s)max abs.*worst at.*\(1, 2\).*pytest --repro"):
        compare.assert_numbers("out", x, wanted, wanted, "float32", 2, 0.0, Case())
