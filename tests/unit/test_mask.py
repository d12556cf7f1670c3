"""_mask.py against one-line brute forces over all small worlds (S2, S3, S6)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.case import Case

from jax_flashattn import _mask

BOUNDS = (None, *range(8))
SIZES = range(7)


def brute(sq: int, sk: int, left, right) -> np.ndarray:
    """S2 as it reads."""
    off = sk - sq
    return np.array(
        [
            [
                (left is None or j >= i + off - left) and (right is None or j <= i + off + right)
                for j in range(sk)
            ]
            for i in range(sq)
        ],
        bool,
    ).reshape(sq, sk)


def _assert_limits(limits, wanted, sk, context):
    lo, hi = (np.asarray(x) for x in limits)
    assert np.array_equal(np.asarray(_mask.visible(lo, hi, sk)), wanted), context
    assert lo.dtype == hi.dtype == np.int32
    assert lo.min(initial=0) >= 0, context
    assert hi.max(initial=0) <= sk, context


@pytest.mark.parametrize("sq", SIZES)
def test_windows_over_all_small_worlds(sq):
    for sk in SIZES:
        done = {}
        for left, right in itertools.product(BOUNDS, BOUNDS):
            kept = _mask.normalized_window(left, right, sq, sk)
            if kept not in done:
                done[kept] = _mask.arithmetic_intervals(sq, sk, *kept)
            wanted = brute(sq, sk, left, right)[None]
            _assert_limits(done[kept], wanted, sk, (sq, sk, left, right, kept))


def test_normalization_drops_exactly_what_hides_nothing():
    """S3: a bound is kept iff it can hide a key, for queries that have keys."""
    for sq, sk in itertools.product(range(1, 7), range(1, 7)):
        for bound in range(8):
            left, right = _mask.normalized_window(bound, bound, sq, sk)
            assert (left is None) == brute(sq, sk, bound, None).all(), (sq, sk, bound)
            assert (right is None) == brute(sq, sk, None, bound).all(), (sq, sk, bound)
            assert left in (None, bound)
            assert right in (None, bound)


@pytest.mark.parametrize("left", [None, 0, 2])
@pytest.mark.parametrize("right", [None, 0, 1])
def test_lengths_over_all_small_worlds(left, right):
    sq, sk = 5, 6
    lengths = np.array(list(itertools.product(range(-1, sq + 2), range(-1, sk + 2))), np.int32)
    limits = _mask.arithmetic_intervals(sq, sk, left, right, jnp.asarray(lengths))
    for b, (length_q, length_k) in enumerate(lengths.clip(0, (sq, sk))):
        wanted = np.zeros((sq, sk), bool)
        wanted[:length_q, :length_k] = brute(length_q, length_k, left, right)
        _assert_limits([x[b] for x in limits], wanted, sk, (lengths[b], left, right))


def _random_ids(rng, rows: int, s: int) -> np.ndarray:
    """Runs of a few ids, with repeats, padding (0) and negative numbers."""
    ids = rng.choice(np.array([0, 1, 1, 2, 3, -4], np.int32), (rows, s))
    stay = rng.random((rows, s)) < rng.choice([0.2, 0.7], (rows, 1))
    for at in range(1, s):
        ids[:, at] = np.where(stay[:, at], ids[:, at - 1], ids[:, at])
    return ids


def _assert_segments(ids_q, ids_k, left, right):
    rows, sq = ids_q.shape
    keys = ids_q if ids_k is None else ids_k
    sk = keys.shape[1]
    given = None if ids_k is None else jnp.asarray(ids_k)
    segments = jax.jit(_mask.segment_rows)(jnp.asarray(ids_q), given)
    limits = jax.jit(_mask.segment_intervals, static_argnums=(1, 2))(segments, left, right)
    case = Case(b=rows, sq=sq, sk=sk, left=left, right=right)
    mask = oracle.Mask(ids_q=ids_q, ids_k=keys)
    wanted = oracle.visible(case, mask)
    alone = oracle.visible(case.replace(left=None, right=None), mask).any(2)
    positions = np.where(alone, segments.centre, 0)
    assert np.array_equal(positions, np.where(alone, oracle.positions(case, mask), 0))
    for b in range(rows):
        context = (ids_q[b].tolist(), keys[b].tolist(), left, right)
        _assert_limits([x[b] for x in limits], wanted[b], sk, context)


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (1, 0), (0, 2), (2, None)])
def test_segments_of_random_ids(left, right):
    rng = np.random.default_rng(0)
    for s in (0, 1, 2, 9):
        _assert_segments(_random_ids(rng, 200, s), None, left, right)


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (1, 1)])
def test_segment_pairs_of_random_ids(left, right):
    """The n-th run of an id meets the n-th; a run without partner sees nothing."""
    rng = np.random.default_rng(1)
    for sq, sk in ((1, 4), (7, 7), (9, 5), (0, 3), (3, 0)):
        _assert_segments(_random_ids(rng, 200, sq), _random_ids(rng, 200, sk), left, right)


def test_segment_ids_at_the_ends_of_int32():
    top, bottom = 2**31 - 1, -(2**31)
    ids = np.array([[top, top, 0, bottom, top, top - 1]], np.int32)
    other = np.array([[bottom, top, 0, top, top, top - 1]], np.int32)
    _assert_segments(ids, None, None, 0)
    _assert_segments(ids, other, None, None)
    _assert_segments(other, ids, 1, 0)


def test_positions_of_lengths():
    lengths = np.array([[3, 4], [0, 5], [9, -1], [6, 1]], np.int32)
    case = Case(b=4, sq=6, sk=5)
    mask = oracle.Mask(lengths_q=lengths[:, 0], lengths_k=lengths[:, 1])
    found = _mask.arithmetic_positions(6, 5, jnp.asarray(lengths))
    assert np.array_equal(found, oracle.positions(case, mask))
    assert _mask.arithmetic_positions(3, 5)[0].tolist() == [2, 3, 4]


def test_intersection_is_the_logical_and():
    rng = np.random.default_rng(2)
    a, b = (tuple(jnp.asarray(rng.integers(-1, 8, (2, 50)), jnp.int32)) for _ in range(2))
    both = _mask.visible(*_mask.intersect(a, b), 7)
    assert np.array_equal(both, _mask.visible(*a, 7) & _mask.visible(*b, 7))
