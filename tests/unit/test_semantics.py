"""csrc/semantics, compiled with the system's compiler, against brute force and against _mask.py."""

import ctypes
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.compiled import ROOT, compile_cxx
from test_mask import BOUNDS, SIZES, brute

from jax_flashattn import _dropout, _mask

SKIP, PARTIAL, FULL = range(3)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    library = compile_cxx(
        tmp_path_factory.mktemp("probe") / "mask_probe.so",
        [ROOT / "tests/support/mask_probe.cc"],
        *("-O1", "-Wall", "-Werror", "-Wno-unused-function", "-fPIC", "-shared"),
        untested="csrc/semantics is NOT tested",
    )
    return ctypes.CDLL(str(library))


def _pointer(x):
    return None if x is None else x.ctypes.data_as(ctypes.c_void_p)


def _longs(*values):
    return [ctypes.c_int64(-1 if x is None else x) for x in values]


def _rows(probe, sq, sk, left, right, n):
    limits = np.full((n, 2), 77, np.int32)
    probe.probe_rows(*_longs(sq, sk, left, right, n), _pointer(limits))
    return limits


def _matrix(limits, sk):
    j = np.arange(sk)
    return (limits[:, :1] <= j) & (j < limits[:, 1:])


def test_rows_over_all_small_worlds(probe):
    for sq, sk in itertools.product(SIZES, SIZES):
        for left, right in itertools.product(BOUNDS, BOUNDS):
            limits = _rows(probe, sq, sk, left, right, sq + 2)
            context = (sq, sk, left, right)
            assert np.array_equal(_matrix(limits[:sq], sk), brute(sq, sk, left, right)), context
            assert not _matrix(limits[sq:], 99).any(), "rows past the sequence see keys"
            assert limits.min(initial=0) >= 0, context
            assert limits.max(initial=0) <= sk, context


def test_rows_are_those_of_python(probe):
    for left, right in itertools.product((None, 0, 3), (None, 0, 2)):
        for sq, sk in ((5, 9), (9, 5), (6, 6)):
            lo, hi = _mask.arithmetic_intervals(sq, sk, left, right)
            limits = _rows(probe, sq, sk, left, right, sq)
            assert np.array_equal(limits, np.stack([lo[0], hi[0]], 1)), (sq, sk, left, right)


def test_long_sequences_do_not_overflow(probe):
    big = 2**30 - 1  # the longest the decoder lets through
    for left, right in ((None, 0), (5, 0), (2**30, 2**30), (big, big)):
        limits = _rows(probe, big, big, left, right, 3)
        for i, (lo, hi) in enumerate(limits):
            assert lo == (0 if left is None else max(0, i - left))
            assert hi == (big if right is None else min(big, i + right + 1))
    for sq, sk in ((1, big), (big, 1)):
        for lo, hi in _rows(probe, sq, sk, 2**30, 2**30, 1):
            assert (lo, hi) == (0, sk if sq == 1 else 1)


def test_clamped_intervals(probe):
    values = np.array([-(2**31), -9, -1, 0, 1, 5, 6, 7, 2**31 - 1], np.int64)
    lo, hi = (np.ascontiguousarray(x.ravel()) for x in np.meshgrid(values, values))
    for sk in (0, 1, 6):
        limits = np.zeros((lo.size, 2), np.int32)
        probe.probe_clamped(*_longs(lo.size), _pointer(lo), _pointer(hi), *_longs(sk),
                            _pointer(limits))  # fmt: skip
        assert limits.min() >= 0
        assert limits.max() <= sk
        j = np.arange(sk)
        wanted = (lo[:, None] <= j) & (j < hi[:, None])
        assert np.array_equal(_matrix(limits, sk), wanted)


def test_mask_sources(probe):
    """Lengths, arrays, and both, of the right batch element."""
    rng, sq, sk, batch = np.random.default_rng(0), 5, 6, 40
    lengths = rng.integers(-2, 9, (batch, 2)).astype(np.int32)
    lo, hi = (rng.integers(-3, 9, (batch, sq)).astype(np.int32) for _ in range(2))
    for use_lengths, use_arrays, b in itertools.product((0, 1), (0, 1), range(batch)):
        limits = np.zeros((sq, 2), np.int32)
        probe.probe_source(
            *_longs(sq, sk, 2, 0),
            *(_pointer(x) for x in (lengths if use_lengths else None,)),
            *(_pointer(x if use_arrays else None) for x in (lo, hi)),
            *_longs(sq, b),
            _pointer(limits),
        )
        length_q, length_k = lengths[b].clip(0, (sq, sk)) if use_lengths else (sq, sk)
        wanted, j = np.zeros((sq, sk), bool), np.arange(sk)
        wanted[:length_q, :length_k] = brute(length_q, length_k, 2, 0)
        if use_arrays:
            wanted[:length_q] = (lo[b][:length_q, None] <= j) & (j < hi[b][:length_q, None])
            wanted[:, length_k:] = False
        assert np.array_equal(_matrix(limits, sk), wanted), (use_lengths, use_arrays, b)


def _classify(probe, lo, hi, j0, j1):
    lo, hi = (np.ascontiguousarray(x, np.int32) for x in (lo, hi))
    return probe.probe_classify(
        *_longs(len(lo)), _pointer(lo), _pointer(hi), *_longs(j0, j1)
    )  # fmt: skip


def _assert_class(probe, lo, hi, j0, j1):
    kind, j = _classify(probe, lo, hi, j0, j1), np.arange(j0, j1)
    see = (np.asarray(lo)[:, None] <= j) & (j < np.asarray(hi)[:, None])
    context = (list(lo), list(hi), j0, j1)
    assert (kind == FULL) == (see.all() and see.size > 0), context
    assert not (kind == SKIP and see.any()), context
    some = [(a, b) for a, b in zip(lo, hi) if a < b]
    outside = not some or j1 <= min(a for a, _ in some) or j0 >= max(b for _, b in some)
    assert (kind == SKIP) == outside, context


def test_tile_classes_over_all_small_worlds(probe):
    """S5: every pair of rows and every tile of up to 4 keys; then random taller tiles."""
    for limits in itertools.product(range(5), repeat=4):
        for j0, j1 in itertools.combinations(range(6), 2):
            _assert_class(probe, limits[::2], limits[1::2], j0, j1)
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, j0 = rng.integers(0, 6), rng.integers(0, 6)
        lo, hi = rng.integers(0, 5, n), rng.integers(3, 12, n)
        _assert_class(probe, lo, hi, j0, j0 + rng.integers(1, 6))


def test_visible_and_empty(probe):
    for lo, hi in itertools.product(range(4), range(4)):
        assert bool(probe.probe_empty(lo, hi)) == (lo >= hi)
        for j in range(5):
            assert bool(probe.probe_visible(lo, hi, ctypes.c_int64(j))) == (lo <= j < hi)


def test_the_mask_of_a_public_call_reaches_the_same_limits(probe):
    """Python's lengths path and the kernel's own agree."""
    lengths = np.array([[3, 4], [0, 5], [9, -1], [6, 1]], np.int32)
    lo, hi = _mask.arithmetic_intervals(6, 5, 1, 0, jnp.asarray(lengths))
    for b in range(len(lengths)):
        limits = np.zeros((6, 2), np.int32)
        probe.probe_source(*_longs(6, 5, 1, 0), _pointer(lengths), None, None, *_longs(6, b),
                           _pointer(limits))  # fmt: skip
        wanted = np.stack([lo[b], hi[b]], 1)
        assert np.array_equal(_matrix(limits, 5), _matrix(wanted, 5))


# Known answers of Random123 (Salmon et al. 2011), philox 4x32-10: counter, key, words.
PHILOX = (
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_known_answers(probe, counter, key, words):
    """S12, in C++, in Python, and in the oracle."""
    counter, key = np.array(counter, np.uint32), np.array(key, np.uint32)
    found = np.zeros(4, np.uint32)
    probe.probe_philox(_pointer(counter), _pointer(key), _pointer(found))
    assert found.tolist() == words
    assert [int(x) for x in _dropout.philox(tuple(jnp.asarray(counter)), tuple(key))] == words
    assert oracle.philox(counter, key).tolist() == words


def test_dropout_masks_of_any_coordinates(probe):
    """C++ and Python draw the same for negative, scattered and far coordinates.

    Far keys are many because low bytes, which they do not share, decide one score in 256.
    """
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 2**32, 4, np.uint32)
    position = np.concatenate([np.arange(-20, 40), rng.integers(-(2**31), 2**31, 50)])
    key = np.concatenate([np.arange(40), 7 + 3 * np.arange(30), rng.integers(0, 2**31, 400)])
    position, key = position.astype(np.int32), key.astype(np.int32)
    for threshold in (0, 1, 30000, 65535, 65536):
        keep = np.zeros((position.size, key.size), np.uint8)
        probe.probe_keep(
            _pointer(stream), *_longs(position.size), _pointer(position), *_longs(key.size),
            _pointer(key), *_longs(threshold), _pointer(keep),
        )  # fmt: skip
        python = _dropout.keep_mask(
            jnp.asarray(stream)[None, None], jnp.asarray(position)[None], jnp.asarray(key)[None],
            threshold,
        )  # fmt: skip
        assert np.array_equal(keep.astype(bool), python[0, 0])
        assert threshold not in (0, 65536) or keep.mean() == (threshold > 0)


def test_dropout_keeps_the_rate_and_neighbours_do_not_follow_each_other(probe):
    """S12: over two million scores, also of pairs and triples that share bits or a call.

    Deviations are those of independent draws, within five standard deviations; what the shared byte
    adds to the covariance, at most 2^-18, is far below.
    """
    rng = np.random.default_rng(1)
    stream = rng.integers(0, 2**32, 4, np.uint32)
    rows, keys = 1000, 2048
    position, key = np.arange(rows, dtype=np.int32), np.arange(keys, dtype=np.int32)
    for threshold in (1, 255, 256, 6554, 32768, 58982, 65535):
        keep = np.zeros((rows, keys), np.uint8)
        probe.probe_keep(
            _pointer(stream), *_longs(rows), _pointer(position), *_longs(keys), _pointer(key),
            *_longs(threshold), _pointer(keep),
        )  # fmt: skip
        p = threshold / 65536
        centred = keep - p
        spread = np.sqrt(p * (1 - p))
        assert abs(centred.mean()) < 5 * spread / np.sqrt(keep.size)
        if not 0.01 < p < 0.99:
            continue  # too few for pairs
        columns = (1, 2, 4, 8, 28, 30, 32, 36, 64, 128, 512, 1024)
        for down, right in (*((0, j) for j in columns), (1, 0), (8, 0), (1, 32)):
            a, b = centred[: rows - down, : keys - right], centred[down:, right:]
            assert abs((a * b).mean()) < 5 * spread**2 / np.sqrt(a.size), (threshold, down, right)
        for near, far in ((32, 64), (128, 256), (4, 32), (4, 132), (2, 32), (28, 128)):
            a, b, c = centred[:, : keys - far], centred[:, near : near - far], centred[:, far:]
            assert abs((a * b * c).mean()) < 5 * spread**3 / np.sqrt(a.size), (threshold, near, far)


def test_coordinates(probe):
    """Positions from sizes, lengths or an array; keys from (start, stride)."""
    lengths = np.array([[3, 4], [9, -1]], np.int32)
    position = np.array([[5, -7, 2**31 - 1], [0, 1, -(2**31)]], np.int32)
    keys = np.array([[0, 1], [3, -2]], np.int32)
    for b, use in itertools.product(range(2), itertools.product((0, 1), repeat=3)):
        rows, columns = np.zeros(3, np.int32), np.zeros(5, np.int32)
        chosen = [_pointer(x if u else None) for x, u in zip((lengths, position, keys), use)]
        probe.probe_coordinates(*_longs(3, 5), *chosen, *_longs(b), _pointer(rows),
                                _pointer(columns))  # fmt: skip
        off = (4 - 3, 0 - 3)[b] if use[0] else 2
        assert rows.tolist() == (position[b].tolist() if use[1] else [off, 1 + off, 2 + off])
        start, stride = keys[b] if use[2] else (0, 1)
        assert columns.tolist() == [start + stride * j for j in range(5)]


def test_distances_wrap_instead_of_overflowing(probe):
    for a, b in itertools.product((-(2**31), -5, 0, 3, 2**31 - 1), repeat=2):
        exact = abs(a - b)
        shorter = min(exact, 2**32 - exact)
        # 2^31 alone has no int32 and is its own negative.
        assert probe.probe_distance(a, b) == (shorter if shorter < 2**31 else -shorter)
