"""IntervalMask's constructors, parts and picture against brute force over small worlds."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mask import brute

from jax_flashattn import IntervalMask, _mask, _mask_plot

SIZES = ((0, 0), (0, 5), (5, 0), (1, 1), (1, 6), (6, 1), (2, 5), (5, 2), (5, 5), (6, 5))


def int32(x):
    return jnp.asarray(x, jnp.int32)


def assert_mask(mask, wanted, sk, context=""):
    """Visibility, and limits that stay within the keys."""
    wanted = np.asarray(wanted)
    assert mask.lo.dtype == mask.hi.dtype == jnp.int32
    assert mask.lo.shape == mask.hi.shape == wanted.shape[:2], context
    assert np.array_equal(mask.materialize(sk), wanted), context
    assert np.asarray(mask.lo).min(initial=0) >= 0, context
    assert np.asarray(mask.hi).max(initial=0) <= sk, context


@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_causal_and_sliding_window(sq, sk):
    assert_mask(IntervalMask.causal(sq, sk), brute(sq, sk, None, 0)[None], sk)
    traced = jax.jit(lambda left, right: IntervalMask.sliding_window(sq, sk, left, right))
    for left, right in itertools.product((None, 0, 1, 4, 2**31 - 1), repeat=2):
        wanted = brute(sq, sk, left, right)[None]
        assert_mask(IntervalMask.sliding_window(sq, sk, left, right), wanted, sk, (left, right))
        sides = [None if side is None else int32(side) for side in (left, right)]
        assert_mask(traced(*sides), wanted, sk, ("traced", left, right))


def test_square_unless_told_otherwise():
    assert_mask(IntervalMask.causal(3), brute(3, 3, None, 0)[None], 3)
    assert_mask(IntervalMask.sliding_window(3, None, 1, 0), brute(3, 3, 1, 0)[None], 3)
    assert_mask(IntervalMask.prefix(int32([1]), 3), IntervalMask.causal(3).materialize(3), 3)
    assert_mask(IntervalMask.chunked(3, 5), brute(3, 3, None, 0)[None], 3)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_prefix(sq, sk):
    lengths = np.arange(-1, sk + 2)
    prefix = np.arange(sk) < lengths[:, None, None]
    wanted = prefix | brute(sq, sk, None, 0)
    assert_mask(jax.jit(lambda n: IntervalMask.prefix(n, sq, sk))(int32(lengths)), wanted, sk)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_chunked(sq, sk):
    aligned, j = np.arange(sq)[:, None] + sk - sq, np.arange(sk)[None]
    for chunk in (1, 2, 3, 7):
        same = aligned // chunk == j // chunk
        for causal in (False, True):
            wanted = same & ((j <= aligned) | (not causal))
            mask = IntervalMask.chunked(sq, chunk, sk, causal=causal)
            assert_mask(mask, wanted[None], sk, (chunk, causal))


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, (1, 0))])
def test_documents_and_cu_seqlens(causal, window):
    """Both say the same, sequences without queries or keys and padding on both ends included."""
    total_q, total_k = 6, 5
    options = {"causal": causal, "window": window}
    right = 0 if causal or window else None

    @jax.jit
    def run(cu_q, cu_k):
        pair = IntervalMask.from_cu_seqlens(cu_q, cu_k, total_q=total_q, total_k=total_k, **options)
        return pair, IntervalMask.from_cu_seqlens(cu_q, total_q=total_q, **options)

    def expected(cu_q, cu_k, sk):
        see = np.zeros((1, total_q, sk), bool)
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
            see[0, q0:q1, k0:k1] = brute(q1 - q0, k1 - k0, window and window[0], right)
        return see

    all_k = list(itertools.combinations_with_replacement(range(total_k + 1), 3))
    for n, cu_q in enumerate(itertools.combinations_with_replacement(range(total_q + 1), 3)):
        for cu_k in all_k[n % 5 :: 5]:
            pair, alone = run(int32(cu_q), int32(cu_k))
            assert_mask(pair, expected(cu_q, cu_k, total_k), total_k, (cu_q, cu_k))
        assert_mask(alone, expected(cu_q, cu_q, total_q), total_q, cu_q)
    ids = np.array([[0, 1, 1, 2, 2, 0]], np.int32)
    by_ids = IntervalMask.documents(int32(ids), **options)
    assert_mask(by_ids, expected([1, 3, 5], [1, 3, 5], 6), 6)
    assert_mask(IntervalMask.documents(ids, ids, **options), by_ids.materialize(6), 6)


WILD = np.array([-(2**31), -3, 0, 1, 2, 5, 7, 11, 12, 2**31 - 1])


def test_parts_of_the_keys():
    """for_keys and for_positions pick columns of the matrix, for any int32 limits."""
    sk = 12
    lo, hi = (int32(x.reshape(1, -1)) for x in np.meshgrid(WILD, WILD))
    mask = IntervalMask(lo, hi)
    whole = np.asarray(mask.materialize(sk))
    take = jax.jit(lambda start, stride: mask.for_keys(start, 4, stride))
    for start, stride in itertools.product((0, 1, 3), (1, 2, 3)):
        keys = start + stride * np.arange(4)
        inside = keys < sk
        for part in (mask.for_keys(start, 4, stride), take(int32(start), int32(stride))):
            got = np.asarray(part.materialize(4))
            assert np.array_equal(got[..., inside], whole[..., keys[inside]]), (start, stride)
        assert np.array_equal(mask.for_positions(int32(keys)).materialize(4)[..., inside],
                              whole[..., keys[inside]])  # fmt: skip
    zigzag = np.array([2, 3, 8, 9])
    assert_mask(mask.for_positions(int32(zigzag)), whole[..., zigzag], 4)
    assert_mask(mask.for_positions(int32([])), whole[..., :0], 0)


def test_it_is_a_pytree_that_can_be_traced_and_mapped():
    mask = IntervalMask.causal(4) & IntervalMask.prefix(int32([1, 3]), 4)
    assert mask.lo.shape == (2, 4)
    again = jax.jit(lambda m: m & m)(mask)
    assert isinstance(again, IntervalMask)
    doubled = jax.vmap(lambda m: m)(jax.tree.map(lambda x: jnp.stack([x, x]), mask))
    assert doubled.lo.shape == (2, 2, 4)
    alone = (IntervalMask.causal(4), IntervalMask.prefix(int32([1, 3]), 4))
    wanted = np.logical_and(*(np.asarray(m.materialize(4)) for m in alone))
    assert np.array_equal(mask.materialize(4), wanted)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: IntervalMask.causal(2.5), TypeError, "sq must be a Python int"),
        (lambda: IntervalMask.causal(3, -1), ValueError, "sk must be 0 or more, got -1"),
        (lambda: IntervalMask.sliding_window(3, 3, -1, 0), ValueError, "left must be 0 or more"),
        (lambda: IntervalMask.sliding_window(3, 3, int32([1]), 0), ValueError, r"left .*\(\)"),
        (lambda: IntervalMask.chunked(3, 0), ValueError, "chunk must be 1 or more, got 0"),
        (lambda: IntervalMask.documents(int32([1, 2])), ValueError, r"2 dimensions.*\(2,\)"),
        (lambda: IntervalMask.documents(jnp.ones((1, 2))), TypeError, "query_ids.*int32.*float32"),
        (lambda: IntervalMask.documents(int32([[1]]), causal=1), TypeError, "causal must be"),
        (lambda: IntervalMask.prefix(int32([[1]]), 3), ValueError, r"1 dimension,.*\(1, 1\)"),
        (lambda: IntervalMask.from_cu_seqlens(int32([0]), total_q=3), ValueError, "at least 2"),
        (
            lambda: IntervalMask.from_cu_seqlens(int32([0, 1]), int32([0, 1]), total_q=3),
            ValueError,
            "cu_seqlens_k and total_k must be given together",
        ),
        (
            lambda: IntervalMask.from_cu_seqlens(
                int32([0, 1]), int32([0, 1, 2]), total_q=3, total_k=3
            ),
            ValueError,
            r"one shape .*\(2,\) and \(3,\)",
        ),
        (lambda: IntervalMask.causal(3).for_positions(int32(3)), ValueError, "1 dimension"),
    ],
)  # fmt: skip
def test_wrong_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_tile_classes():
    """S5: full iff everything is visible, skipped iff outside the hull of the rows' intervals."""
    rng = np.random.default_rng(0)
    b, sq, sk = 200, 7, 9
    lo, hi = rng.integers(-1, sk + 1, (b, sq)), rng.integers(0, sk + 2, (b, sq))
    lo[::2], hi[::2] = np.sort(lo[::2]), np.maximum(np.sort(hi[::2]), np.sort(lo[::2]) + 2)
    see = np.asarray(_mask.visible(int32(lo), int32(hi), sk))
    for rows, keys in ((1, 1), (2, 4), (3, 2), (7, 9), (10, 20)):
        got = np.asarray(_mask.tile_classes((int32(lo), int32(hi)), sk, rows, keys))
        for n, (i, row_tile) in itertools.product(range(b), enumerate(range(0, sq, rows))):
            band = see[n, row_tile : row_tile + rows]
            seen = np.flatnonzero(band.any(0))
            hull = (seen[0], seen[-1] + 1) if seen.size else (sk, 0)
            for j, first in enumerate(range(0, sk, keys)):
                end = min(first + keys, sk)
                skip = end <= hull[0] or first >= hull[1]
                full = band[:, first:end].all()
                wanted = _mask.SKIP if skip else _mask.FULL if full else _mask.PARTIAL
                assert got[n, i, j] == wanted, (lo[n], hi[n], rows, keys, i, j)
        assert got.shape == (b, -(-sq // rows), -(-sk // keys))
    assert set(np.unique(got)) == {_mask.SKIP, _mask.PARTIAL, _mask.FULL} or rows == 10


def _colours(axes):
    return np.asarray(axes.images[0].get_array())


def test_the_picture_shows_the_mask():
    pytest.importorskip("matplotlib")
    mask = IntervalMask.documents(int32([[1] * 9 + [2] * 5 + [0] * 2, [3] * 16]), causal=True)
    figure = mask.plot(16, batch=(1, 0), tile=(4, 4))
    visible = {_mask_plot._rgb(c) for _, see, c in _mask_plot.COLOURS.values() if see}
    for axes, n in zip(figure.axes, (1, 0), strict=True):
        image = _colours(axes)
        shown = np.array([[tuple(pixel) in visible for pixel in row] for row in image.tolist()])
        assert np.array_equal(shown, mask.materialize(16)[n])
        assert axes.get_title().startswith(f"batch {n}, tiles: ")
    blue = _mask_plot._rgb(_mask_plot.COLOURS["full tile"][2])
    assert (_colours(figure.axes[0])[4:8, :4] == blue).all(), "a full tile is not shown as full"
    assert (_colours(figure.axes[0])[:4, :4] != blue).any(2).all(), "nor a partial one as partial"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(_mask_plot.COLOURS)


def test_pictures_of_long_sequences_are_sampled(tmp_path):
    pytest.importorskip("matplotlib")
    figure = IntervalMask.causal(5000, 3000).plot(3000)
    image = _colours(figure.axes[0])
    assert image.shape == (_mask_plot.MOST_PIXELS, _mask_plot.MOST_PIXELS, 3)
    figure.savefig(tmp_path / "mask.png", dpi=40)
    assert (tmp_path / "mask.png").stat().st_size > 1000


def test_plot_says_what_is_wrong(monkeypatch):
    mask = IntervalMask.causal(4)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 4\), got \[1\]"):
        mask.plot(4, batch=(1,))
    with pytest.raises(ValueError, match="tile must be 1 or more"):
        mask.plot(4, tile=(0, 1))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jax_flashattn\[plot\]'"):
        mask.plot(4)
