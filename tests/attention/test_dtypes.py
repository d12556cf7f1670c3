"""Every dtype over masks, head dims and lengths; what may not be mixed is in test_validate."""

import numpy as np
import pytest
from support import grids
from support.case import cases
from support.check import check_case, execute
from support.data import make_problem

SAMPLE = (
    *(grids.HEADS[3:6:2] + grids.HEAD_DIMS[::3] + grids.VALUE_DIMS[:4] + grids.SHAPES[::3]),
    *(grids.WINDOWS[::4] + grids.SCALES[1:5] + grids.STRUCTURED),
    *(grids.LENGTHS[1::4] + grids.SEGMENTS[1::5] + grids.INTERVALS[::3] + grids.COMBINED[::3]),
)


# Products of bfloat16 are kernels of their own; float16 is widened to float32's.
_CHOICES = (("bfloat16", SAMPLE), ("float16", SAMPLE[::2]), ("float64", SAMPLE[1::2]))


@cases(*(case.replace(dtype=dtype) for dtype, choice in _CHOICES for case in choice))
def test_dtypes(case):
    check_case(case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_accumulates_in_float32(dtype):
    """300 equal values must not lose their sum: half accumulators would stall at 256."""
    case = grids.SHAPES[0].replace(sq=1, sk=300, scale=0.0, dtype=dtype)
    problem = make_problem(case)
    ones = {n: np.ones_like(problem.given[n]) for n in ("value", "dout")}
    results = execute(problem, problem.given | ones)
    assert (results["out"].astype(float) == 1).all()
    np.testing.assert_allclose(results["lse"], np.log(300), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_largest_finite_values_of_the_dtype(dtype):
    """Scores overflow nothing when the scale brings them back."""
    case = grids.SHAPES[-3].replace(sq=9, sk=20, dtype=dtype)
    problem = make_problem(case.replace(scale=1e-9 if dtype == "bfloat16" else 1e-8))
    big = {n: problem.given[n] * np.array(1e4, problem.given[n].dtype) for n in ("query", "key")}
    results = execute(problem, problem.given | big)
    assert np.isfinite(results["out"].astype(float)).all()
    assert np.isfinite(results["lse"]).all()
