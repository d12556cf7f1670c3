"""S7 and its relatives: one mask written in different ways gives the same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, oracle
from support.case import Case, cases
from support.check import check_case, execute
from support.compare import assert_bitwise
from support.data import make_mask, make_problem

from jax_flashattn import IntervalMask, flash_attention

LENGTHS = (40, 1, 97, 64)
PACKED = Case(sq=sum(LENGTHS), sk=sum(LENGTHS), hq=4, hk=2, layout="segments", dlse=True)
WINDOWS = ({}, {"causal": True}, {"left": 10, "right": 3}, {"left": 0, "right": 0})


@cases(*grids.LENGTHS)
def test_lengths(case):
    check_case(case)


@cases(*grids.SEGMENTS)
def test_segments(case):
    check_case(case)


@cases(*grids.INTERVALS)
def test_interval_masks(case):
    check_case(case)


@cases(*grids.COMBINED)
def test_everything_that_hides_keys_combines(case):
    check_case(case)


def _cut(arrays: dict, start: int, stop: int) -> dict:
    """One document of packed arrays."""
    return {n: x[..., start:stop] if x.ndim == 3 else x[:, start:stop] for n, x in arrays.items()}


def _close(name, x, wanted):
    np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_packed_padded_and_separate_calls_agree(window):
    packed = make_problem(PACKED.replace(lengths_q=(LENGTHS,), **window))
    results = execute(packed, packed.given)
    longest, ends = max(LENGTHS), np.cumsum(LENGTHS)
    parts = [_cut(packed.given, end - n, end) for end, n in zip(ends, LENGTHS)]

    def pad(x, n):
        axis = 2 if x.ndim == 3 else 1
        return np.pad(x, [(0, longest - n if a == axis else 0) for a in range(x.ndim)])

    padded = PACKED.replace(
        b=len(LENGTHS), sq=longest, sk=longest, layout="lengths", lengths_q=LENGTHS, **window
    )
    stacked = {
        name: np.concatenate([pad(part[name], n) for part, n in zip(parts, LENGTHS)])
        for name in packed.given
    }
    padded_results = execute(make_problem(padded), stacked)
    for index, (end, n) in enumerate(zip(ends, LENGTHS)):
        wanted = _cut(results, end - n, end)
        dense = Case(sq=n, sk=n, hq=4, hk=2, dlse=True, **window)
        separate = execute(make_problem(dense), parts[index])
        from_padded = _cut({k: x[index : index + 1] for k, x in padded_results.items()}, 0, n)
        for name, x in wanted.items():
            _close(name, separate[name], x)
            _close(name, from_padded[name], x)


@pytest.mark.parametrize(("sq", "sk"), [(50, 50), (30, 70), (70, 30)])
def test_causal_is_the_window_without_a_right_side(sq, sk):
    causal = Case(sq=sq, sk=sk, hq=2, causal=True, dlse=True)
    window = causal.replace(causal=False, right=0)
    problem = make_problem(causal)
    a, b = execute(problem, problem.given), execute(make_problem(window), problem.given)
    for name, x in a.items():
        assert_bitwise(name, x, b[name])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_interval_mask_of_a_window_is_the_window(window):
    case = Case(b=2, sq=65, sk=99, hq=2, **window)
    problem = make_problem(case)
    see = problem.see[0]
    lo = np.where(see.any(1), see.argmax(1), 0).astype(np.int32)[None]
    hi = (lo + see.sum(1)).astype(np.int32)
    mask = IntervalMask(jnp.asarray(lo), jnp.asarray(hi))
    args = [problem.given[n] for n in ("query", "key", "value")]
    out, lse = flash_attention(*args, mask=mask, return_lse=True)
    wanted, wanted_lse = flash_attention(*args, return_lse=True, **case.options())
    assert_bitwise("out", out, wanted)
    assert_bitwise("lse", lse, wanted_lse)


def test_interval_mask_intersection_and_matrix():
    first = make_mask(Case(b=3, sq=20, sk=15, interval="random", geometry_seed=1))
    second = make_mask(Case(b=3, sq=20, sk=15, interval="wild", geometry_seed=2))
    a, b = (IntervalMask(jnp.asarray(m.lo), jnp.asarray(m.hi)) for m in (first, second))
    wanted = oracle.visible(Case(b=3, sq=20, sk=15), first) & oracle.visible(
        Case(b=3, sq=20, sk=15), second
    )
    assert np.array_equal(np.asarray((a & b).materialize(15)), wanted)


def test_one_interval_row_serves_the_whole_batch():
    problem = make_problem(Case(b=3, sq=20, sk=30, interval="random"))
    args = [problem.given[n] for n in ("query", "key", "value")]
    lo, hi = problem.mask.lo[:1], problem.mask.hi[:1]
    one = flash_attention(*args, mask=IntervalMask(jnp.asarray(lo), jnp.asarray(hi)))
    three = IntervalMask(*(jnp.asarray(np.repeat(x, 3, axis=0)) for x in (lo, hi)))
    assert_bitwise("out", one, flash_attention(*args, mask=three))


def test_permuting_documents_permutes_results():
    order, ends = (2, 0, 3, 1), np.cumsum(LENGTHS)
    index = np.concatenate([np.arange(ends[n] - LENGTHS[n], ends[n]) for n in order])
    case = PACKED.replace(causal=True, lengths_q=(LENGTHS,))
    problem = make_problem(case)
    moved = {n: x[..., index] if x.ndim == 3 else x[:, index] for n, x in problem.given.items()}
    other = make_problem(case.replace(lengths_q=(tuple(LENGTHS[n] for n in order),)))
    before, after = execute(problem, problem.given), execute(other, moved)
    for name, x in before.items():
        _close(name, after[name], x[..., index] if x.ndim == 3 else x[:, index])


def test_permuting_keys_permutes_only_their_gradients():
    problem = make_problem(Case(b=2, sq=50, sk=130, hq=2, dlse=True))
    index = np.random.default_rng(0).permutation(130)
    moved = problem.given | {n: problem.given[n][:, index] for n in ("key", "value")}
    before, after = execute(problem, problem.given), execute(problem, moved)
    for name, x in before.items():
        _close(name, after[name], x[:, index] if name in ("dk", "dv") else x)


def test_splitting_the_keys_and_merging_by_lse_is_the_whole():
    problem = make_problem(Case(b=2, sq=50, sk=140, hq=2))
    q, k, v = (problem.given[n] for n in ("query", "key", "value"))
    whole, whole_lse = flash_attention(q, k, v, return_lse=True)
    parts = [
        flash_attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 33), (33, 140))
    ]
    lse = np.logaddexp(*(np.asarray(x[1]) for x in parts))
    weight = [np.exp(np.asarray(x[1]) - lse).swapaxes(1, 2)[..., None] for x in parts]
    _close("lse", whole_lse, lse)
    _close("out", whole, sum(w * np.asarray(x[0]) for w, x in zip(weight, parts)))
