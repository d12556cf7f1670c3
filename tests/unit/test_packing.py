"""Conversions between the forms of packed sequences, and packing on the host."""

import jax
import numpy as np
import pytest

from jax_flashattn import packing

LENGTHS = ([3], [2, 5, 1], [1, 1, 1, 1], [9])


def _plain(lengths, total):
    """ids, positions, cu_seqlens by hand."""
    ids, positions, cu = [], [], [0]
    for n, length in enumerate(lengths):
        ids += [n + 1] * length
        positions += range(length)
        cu.append(cu[-1] + length)
    rest = [0] * (total - len(ids))
    return ids + rest, positions + rest, cu


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("total", [9, 12])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_round_trips(lengths, total, wrap):
    ids, positions, cu = _plain(lengths, total)
    cu_array, ids_array = np.array(cu, np.int32), np.array(ids, np.int32)
    get = lambda f, *x: wrap(f)(*x).tolist()  # noqa: E731
    assert get(lambda x: packing.segment_ids_from_cu_seqlens(x, total), cu_array) == ids
    assert get(lambda x: packing.positions_from_cu_seqlens(x, total), cu_array) == positions
    assert get(packing.positions_from_segment_ids, ids_array) == positions
    found = get(lambda x: packing.cu_seqlens_from_segment_ids(x, 6), ids_array)
    assert found == cu + [cu[-1]] * (7 - len(cu))
    real = ids_array != 0
    rebuilt = get(packing.segment_ids_from_positions, np.array(positions, np.int32), real)
    assert rebuilt == ids


def test_rows_of_a_batch_are_independent():
    ids = np.array([[4, 4, 9], [4, 0, 9], [0, 0, 0], [1, 1, 1]], np.int32)
    positions = packing.positions_from_segment_ids(ids)
    assert positions.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 2]]
    assert jax.vmap(packing.positions_from_segment_ids)(ids).tolist() == positions.tolist()


def test_positions_without_padding():
    ids = packing.segment_ids_from_positions(np.array([[0, 1, 0], [0, 1, 2]], np.int32))
    assert ids.tolist() == [[1, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_attention_mask_in_length(wrap):
    rows = [[2, 3, 0, 0, 0, 0], [3, 0, 2, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0] * 6]
    ids = wrap(packing.segment_ids_from_attention_mask_in_length)(np.array(rows, np.int32))
    wanted = [[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 0], [1] * 6, [0] * 6]
    assert ids.tolist() == wanted


def test_errors():
    with pytest.raises(ValueError, match="before a segment"):
        packing.cu_seqlens_from_segment_ids(np.array([1, 0, 2], np.int32))
    with pytest.raises(ValueError, match="3 segments, max_segments is 2"):
        packing.cu_seqlens_from_segment_ids(np.array([1, 2, 1], np.int32), 2)
    with pytest.raises(ValueError, match="a row of 7 tokens, s is 6"):
        packing.segment_ids_from_attention_mask_in_length(np.array([[2, 5, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        packing.segment_ids_from_attention_mask_in_length(np.array([[2, -1, 0]]))
    with pytest.raises(ValueError, match="row_length is 3"):
        packing.pack([np.arange(4)], 3)
    with pytest.raises(ValueError, match="sequences is empty"):
        packing.pack([], 3)
    with pytest.raises(TypeError, match="int32"):
        packing.positions_from_segment_ids(np.ones(3, np.float32))


def test_pack_and_unpack():
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal((n, 2)) for n in rng.integers(0, 30, 200)]
    rows, where = packing.pack(sequences, 64, fill=7)
    assert rows.shape[1:] == (64, 2)
    for x, y in zip(sequences, packing.unpack(rows, where), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.all(rows[where.segment_ids == 0] == 7)
    # Tokens are placed once: as many as there are.
    assert np.count_nonzero(where.segment_ids) == sum(map(len, sequences))
    assert (
        where.positions.tolist() == packing.positions_from_segment_ids(where.segment_ids).tolist()
    )
    # First fit leaves at most one row at most half full.
    assert np.sum(np.count_nonzero(where.segment_ids, axis=1) <= 32) <= 1
