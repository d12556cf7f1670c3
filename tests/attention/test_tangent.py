"""Forward mode: tangents of output and log-sum-exp by their own kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, hlo
from support.case import Case, cases
from support.compare import assert_bitwise
from support.data import make_problem
from support.tangent import ARRAYS, check_tangents, directions, execute, jitted

from jax_flashattn import flash_attention

EVERYTHING = {"softcap": 1.5, "alibi": "bh", "sinks": True, "dropout": 0.25, "bias": "hij"}
BASE = Case(b=2, sq=70, sk=130, hq=4, hk=2, d=24, dv=40, causal=True)
GRID = (
    *(grids.HEADS[::2] + grids.HEAD_DIMS[::3] + grids.VALUE_DIMS + grids.SHAPES[::4]),
    *(grids.WINDOWS[::5] + grids.CAUSAL_WINDOWS[::4] + grids.SCALES[2:5] + grids.STRUCTURED),
    *(grids.LENGTHS[::4] + grids.SEGMENTS[1::5] + grids.INTERVALS[::2] + grids.COMBINED[::3]),
    *(grids.FEATURES[::3] + grids.BIASES[::2]),
)


@cases(*GRID)
def test_tangents(case):
    check_tangents(case)


SAMPLE = (
    *(grids.HEAD_DIMS[2::5] + grids.SHAPES[7:9] + grids.SCALES[3:4] + grids.LENGTHS[1:2]),
    *(grids.SEGMENTS[13:14] + grids.FEATURES[5::12] + grids.BIASES[11:18:3]),
)


@cases(*(case.replace(dtype=t) for case in SAMPLE for t in ("bfloat16", "float16", "float64")))
def test_dtypes(case):
    check_tangents(case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@cases(
    BASE.replace(poison="invisible", layout="lengths", lengths_q=(60, 1), lengths_k=(99, 3)),
    BASE.replace(poison="invisible", interval="random", **EVERYTHING),
    BASE.replace(poison="tail", layout="segments", lengths_q=((30, -2, 38), (1, 64)),
                 lengths_k=((64, 60), (-5, 9, 97))),
)  # fmt: skip
def test_nan_in_what_nobody_uses_has_no_effect(case, dtype):
    """S13, for the arrays and for their tangents."""
    case = case.replace(dtype=dtype)
    problem = make_problem(case)
    poisoned = {n: np.isnan(x.astype(float)).any() for n, x in directions(problem)[1].items()}
    assert poisoned["key"], "vacuous"
    assert poisoned["value"], "vacuous"
    check_tangents(case)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_a_visible_tangent_reaches_exactly_the_rows_that_see_it(name, dtype):
    problem = make_problem(BASE.replace(dtype=dtype))
    moved = directions(problem)[1]
    s = 30 if name == "query" else 100  # the last 30 of 70 rows see key 100
    moved[name][1, s, 0, 3] = np.nan
    results = execute(problem, moved)
    rows, heads = np.zeros((2, 70, 4), bool), 1 if name == "query" else 2
    rows[1, 30 if name == "query" else 40 :, :heads] = True
    if name == "query":
        rows[1, 31:] = False
    hit = np.isnan(results["dout"].astype(float))
    assert np.array_equal(hit.any(-1), rows)
    if name == "value":
        assert np.array_equal(hit[..., 3], rows)
        assert hit.sum() == rows.sum()
    wanted = rows.swapaxes(1, 2) if name != "value" else np.zeros((2, 4, 70), bool)
    assert np.array_equal(np.isnan(results["dlse"]), wanted)


@cases(
    Case(sq=5, sk=0, hq=2, **EVERYTHING),
    Case(sq=0, sk=7, hq=2, **EVERYTHING),
    Case(b=0, sq=4, sk=7, hq=2, **EVERYTHING),
    Case(sq=90, sk=3, hq=2, causal=True, **EVERYTHING),
    Case(b=2, sq=20, sk=20, hq=2, layout="lengths", lengths_q=(0, 3), **EVERYTHING),
)
def test_empty_sizes_and_rows_that_see_nothing(case):
    """S11: their tangents are 0, sinks or not."""
    check_tangents(case)


def test_a_bias_that_hides_a_whole_row():
    """S11: tangents are 0 where -inf hides every key, and as the reference's elsewhere."""
    problem = make_problem(BASE)
    bias = np.zeros((1, 1, 70, 130), np.float32)
    bias[:, :, 5], bias[:, :, 6, :50] = -np.inf, -np.inf
    primals = (*(jnp.asarray(problem.given[n]) for n in ARRAYS), jnp.asarray(bias))
    moved = (*primals[:3], jnp.ones_like(bias))

    def tangents(implementation):
        def attend(q, k, v, bias):
            return flash_attention(
                q, k, v, bias=bias, causal=True, return_lse=True, differentiation="forward",
                implementation=implementation,
            )  # fmt: skip

        dout, dlse = jax.jvp(attend, primals, moved)[1]
        return np.asarray(dout).swapaxes(1, 2), np.asarray(dlse)

    for ours, wanted in zip(tangents("kernel"), tangents("reference")):
        assert not ours[:, :, 5].any()
        np.testing.assert_allclose(
            np.delete(ours, 5, 2), np.delete(wanted, 5, 2), rtol=1e-4, atol=2e-5
        )


@cases(BASE.replace(**EVERYTHING), BASE.replace(dtype="bfloat16"))
def test_values_are_those_of_reverse_mode_and_tangents_are_linear(case):
    """Bitwise: doubling is exact in every product and sum."""
    problem = make_problem(case)
    _, moved = directions(problem)
    results = execute(problem, moved)
    doubled = execute(problem, {n: 2 * x for n, x in moved.items()})
    zero = execute(problem, {n: 0 * x for n, x in moved.items()})
    for name in ("dout", "dlse"):
        assert_bitwise(name, doubled[name], 2 * results[name])
        assert not zero[name].any()
    options = case.options() | problem.mask_arguments() | {"return_lse": True}
    out, lse = flash_attention(*(problem.given[n] for n in ARRAYS), **options)
    assert_bitwise("out", results["out"], out)
    assert_bitwise("lse", results["lse"], lse)


@cases(BASE.replace(dtype="float64", **EVERYTHING), BASE.replace(dtype="float64", interval="wild"))
def test_the_kernel_computes_what_jax_derives_from_the_reference(case):
    """Every tangent at once and each alone, to float64 noise."""
    problem = make_problem(case)
    _, moved = directions(problem)
    for one in (None, *moved):
        now = {n: x if one in (None, n) else 0 * x for n, x in moved.items()}
        results = execute(problem, now)
        with jax.enable_x64(True):
            arguments = problem.mask_arguments()
            primals = {n: problem.given[n] for n in ARRAYS}
            primals |= {n: arguments.pop(n) for n in ("bias", "sinks") if n in arguments}
            options = (*case.options().items(), ("implementation", "reference"))
            _, wanted = jitted(options)(primals, now, arguments)
            for name, x in zip(("dout", "dlse"), wanted):
                np.testing.assert_allclose(results[name], x, rtol=1e-11, atol=1e-12, err_msg=one)


@cases(BASE.replace(dtype="float64", **EVERYTHING))
def test_finite_differences(case):
    """The tangent against the kernel's own forward."""
    problem, step = make_problem(case), 1e-5
    _, moved = directions(problem)
    results = execute(problem, moved)
    arguments = problem.mask_arguments()
    primals = {n: problem.given[n] for n in ARRAYS} | {n: arguments[n] for n in ("bias", "sinks")}

    def at(x):
        arrays = {n: primals[n] + x * moved[n] for n in primals}
        args = [arrays.pop(n) for n in ARRAYS]
        options = arguments | arrays | case.options()
        return flash_attention(*args, return_lse=True, **options)

    with jax.enable_x64(True):
        for name, ahead, behind in zip(("dout", "dlse"), at(step), at(-step)):
            wanted = (np.asarray(ahead) - np.asarray(behind)) / (2 * step)
            np.testing.assert_allclose(results[name], wanted, rtol=1e-6, atol=1e-7)


def test_no_square_is_held_and_memory_is_linear():
    def compiled(s):
        x = jax.ShapeDtypeStruct((1, s, 2, 32), jnp.bfloat16)

        def tangent(*x):
            attend = lambda q, k, v: flash_attention(  # noqa: E731
                q, k, v, causal=True, return_lse=True, differentiation="forward"
            )
            return jax.jvp(attend, x[:3], x[3:])

        return jax.jit(tangent).lower(*[x] * 6).compile()

    small, large = compiled(4096), compiled(8192)
    hlo.assert_kernels(large.as_text(), forward=1, tangent=1)
    hlo.assert_no_square(large.as_text(), 8192, 8192)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert sizes[1] <= 2.1 * sizes[0] + 1024
