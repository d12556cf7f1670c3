"""Gradients: properties that need no reference, and finite differences of the kernel itself."""

import jax
import numpy as np
import pytest
from support.case import Case, cases
from support.check import GRADIENTS, check_case, execute, jitted, x64_if
from support.compare import assert_bitwise
from support.data import make_problem

CASES = (
    Case(b=2, sq=70, sk=130, hq=4, hk=2, d=24, dv=40, causal=True, left=40),
    Case(b=2, sq=130, sk=70, hq=6, hk=3, causal=True),
    Case(b=2, sq=99, sk=99, hq=2, layout="segments", lengths_q=((30, 60), (99,)), causal=True),
)


@cases(*CASES)
def test_zero_cotangents_give_zero_gradients(case):
    problem = make_problem(case)
    given = problem.given | {"dout": np.zeros_like(problem.given["dout"])}
    results = execute(problem, given)
    for name in GRADIENTS:
        assert not results[name].any(), f"{name} is not exactly 0"


@cases(*(case.replace(dtype=dtype) for case in CASES for dtype in ("float32", "bfloat16")))
def test_doubling_value_and_cotangent_doubles_bitwise(case):
    problem = make_problem(case)
    once = execute(problem, problem.given)
    doubled = {name: problem.given[name] * np.array(2, once["out"].dtype) for name in ("dout",)}
    by_dout = execute(problem, problem.given | doubled)
    for name in GRADIENTS:
        assert_bitwise(name, by_dout[name], once[name] * np.array(2, once[name].dtype), case)
    value = problem.given["value"] * np.array(2, once["out"].dtype)
    by_value = execute(problem, problem.given | {"value": value})
    assert_bitwise("out", by_value["out"], once["out"] * np.array(2, once["out"].dtype), case)
    assert_bitwise("dv", by_value["dv"], once["dv"], case)
    assert_bitwise("lse", by_value["lse"], once["lse"], case)


@cases(*CASES[:2])
def test_grouped_heads_are_repeated_keys_with_summed_gradients(case):
    problem, group = make_problem(case), case.hq // case.hk
    grouped = execute(problem, problem.given)
    wide = make_problem(case.replace(hk=case.hq))
    repeated = {n: np.repeat(problem.given[n], group, axis=2) for n in ("key", "value")}
    full = execute(wide, problem.given | repeated)
    for name in ("out", "lse", "dq"):
        np.testing.assert_allclose(full[name], grouped[name], rtol=2e-5, atol=2e-6)
    for name in ("dk", "dv"):
        b, s, _, d = full[name].shape
        summed = full[name].reshape(b, s, case.hk, group, d).sum(3)
        np.testing.assert_allclose(summed, grouped[name], rtol=2e-5, atol=1e-5)


@cases(*CASES)
def test_a_batch_is_its_elements_one_by_one(case):
    """Not bitwise: how many tiles share a pass over the keys depends on the batch size."""
    problem = make_problem(case)
    together = execute(problem, problem.given)
    for b in range(case.b):
        one = case.replace(b=1)
        if case.layout != "dense":
            one = one.replace(lengths_q=case.lengths_q[b : b + 1])
        given = {name: x[b : b + 1] for name, x in problem.given.items()}
        for name, x in execute(make_problem(one), given).items():
            wanted = together[name][b : b + 1]
            np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=5e-6, err_msg=name)


@cases(*(case.replace(dtype="float64", dlse=True) for case in CASES))
def test_finite_differences(case):
    """Central differences of the kernel's own forward in float64, along random directions."""
    problem = make_problem(case)
    x, rng = problem.given, np.random.default_rng(1)
    gradients = execute(problem, x)
    step = 1e-5

    def objective(arrays):
        results = execute(problem, arrays)
        finite = np.isfinite(results["lse"])
        return (results["out"] * x["dout"]).sum() + (results["lse"] * x["dlse"])[finite].sum()

    for name, gradient in (("query", "dq"), ("key", "dk"), ("value", "dv")):
        direction = rng.standard_normal(x[name].shape)
        ahead, behind = (
            objective(x | {name: x[name] + sign * step * direction}) for sign in (1, -1)
        )
        wanted = (gradients[gradient] * direction).sum()
        assert (ahead - behind) / (2 * step) == pytest.approx(wanted, rel=1e-7, abs=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reruns_are_bitwise_equal(dtype, deterministic):
    """S14: enough rows for several threads and several shares of the accumulators."""
    case = Case(b=2, sq=300, sk=300, hq=16, hk=2, dtype=dtype, causal=True, dlse=True)
    problem = make_problem(case.replace(deterministic=deterministic))
    first = execute(problem, problem.given)
    for _ in range(5):
        for name, x in execute(problem, problem.given).items():
            assert_bitwise(name, x, first[name], case)


def test_shares_of_a_long_group_add_up():
    """One key head with so many query rows that several tasks share its accumulators."""
    check_case(Case(sq=300, sk=65, hq=16, hk=1, causal=True, left=20, dlse=True))
    check_case(Case(sq=260, sk=301, hq=30, hk=2, dtype="bfloat16", causal=True, dlse=True))


def test_gradients_of_a_sum_with_lse_do_not_touch_the_other_term():
    """d(lse)/dv is 0, and d(out)/dq does not depend on dlse being asked for."""
    case = Case(b=2, sq=33, sk=40, hq=2, causal=True)
    problem = make_problem(case.replace(dlse=True))
    lse_only = execute(problem, problem.given | {"dout": np.zeros_like(problem.given["dout"])})
    assert not lse_only["dv"].any()
    assert lse_only["dq"].any()
    out_only = execute(make_problem(case), problem.given | {"dlse": problem.given["dlse"] * 0})
    both = execute(problem, problem.given)
    for name in GRADIENTS:
        total = lse_only[name] + out_only[name]
        np.testing.assert_allclose(total, both[name], rtol=1e-4, atol=2e-5)


def test_float64_needs_no_x64_flag_of_the_process():
    """The program compiled under the x64 context stays float64."""
    problem = make_problem(CASES[0].replace(dtype="float64"))
    with x64_if(True):
        given = [problem.given[n] for n in ("query", "key", "value", "dout", "dlse")]
        shapes = jax.eval_shape(jitted(tuple(CASES[0].options().items())), *given, {})
    assert {str(x.dtype) for x in shapes} == {"float64"}
