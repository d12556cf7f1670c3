"""Value and gradients over heads, head dims, lengths, windows, scales and kinds of data."""

import numpy as np
import pytest
from support import grids
from support.case import Case, cases
from support.check import check_case
from support.data import make_problem


@cases(*grids.HEADS)
def test_head_counts(case):
    check_case(case)


@cases(*grids.HEAD_DIMS)
def test_head_dims(case):
    check_case(case)


@cases(*grids.VALUE_DIMS)
def test_value_dim_differs(case):
    check_case(case)


@cases(*grids.SHAPES)
def test_lengths_of_sequences(case):
    check_case(case)


@cases(*grids.WINDOWS)
def test_windows(case):
    check_case(case)


@cases(*grids.CAUSAL_WINDOWS)
def test_causal_bounds_a_window(case):
    check_case(case)


@cases(*grids.SCALES)
def test_scales(case):
    check_case(case)


@cases(*grids.STRUCTURED)
def test_structured_inputs(case):
    check_case(case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_output_is_the_probability_matrix_for_identity_values(dtype):
    case = Case(b=2, sq=70, sk=120, hq=2, dv=120, data="identity_v", causal=True, left=7)
    out = check_case(case.replace(dtype=dtype))["out"].astype(float)
    i, j = np.arange(70)[:, None], np.arange(120)
    sees = (j <= i + 50) & (j >= i + 50 - 7)
    assert np.array_equal(out != 0, np.broadcast_to(sees[None, :, None], out.shape))
    assert abs(out.sum(-1) - 1).max() < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_that_are_exact_are_exact(dtype):
    """Scale 0 over 64 keys: every probability is 1/64, and sums of small integers are exact.

    2^0 was once 1 + 7e-8, which only float32, and bfloat16 without AVX512-BF16, show. dV has
    probabilities from the lse, which float32 rounds.
    """
    case = Case(b=2, sq=64, sk=64, hq=4, hk=4, scale=0.0, data="integer", dtype=dtype)
    x = make_problem(case).given
    results = check_case(case)
    for name in ("dq", "dk"):
        assert not results[name].astype(float).any(), f"{name} is not exactly 0"
    for name, given in (("out", "value"), ("dv", "dout"))[: 1 if dtype == "float32" else 2]:
        wanted = np.broadcast_to(x[given].astype(float).mean(1, keepdims=True), x[given].shape)
        assert np.array_equal(results[name], wanted.astype(x[given].dtype)), name


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 3), (5, 2)])
def test_a_row_sees_left_plus_right_plus_one_keys(left, right):
    case = Case(sq=40, sk=40, dv=40, left=left, right=right, data="identity_v")
    out = check_case(case)["out"][0, :, 0]
    middle = np.count_nonzero(out[left : 40 - right], axis=1)
    assert set(middle) == {left + right + 1}
