"""flash-attn's varlen functions against one dense call per sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import derivatives, hlo
from support.torch_names import dense

from jax_flashattn import flash_attn_varlen as module
from jax_flashattn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    packing,
)

# Options a call may have, by flash-attn's names.
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
SINKS = np.array([0.3, -1.0, 2.0, -np.inf])
FEATURES = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (4, -1)},
    {"window_size": (2, 3), "softmax_scale": 0.3},
    {"causal": True, "softcap": 2.0, "alibi_slopes": SLOPES},
    {"window_size": (5, 5), "alibi_slopes": SLOPES, "learnable_sink": SINKS},
)
# Lengths of the sequences (queries, keys).
LENGTHS = {
    "equal": ((7, 1, 20, 5), (7, 1, 20, 5)),
    "unequal": ((7, 1, 20, 5), (9, 30, 4, 6)),
    "empty keys": ((7, 3, 5, 2), (9, 0, 4, 6)),
    "empty queries": ((0, 7, 0, 0, 2), (9, 3, 4, 6, 1)),
    "empty sides in turn": ((0, 4, 0, 5, 0, 6), (3, 0, 2, 0, 1, 8)),
    "all empty": ((0, 0), (0, 0)),
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def cumulative(lengths) -> np.ndarray:
    return np.append(0, np.cumsum(lengths)).astype(np.int32)


def one_by_one(q, k, v, dout, lengths_q, lengths_k, **features):
    """out, lse, dq, dk, dv of one dense call per sequence; the rest 0, lse -inf."""
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    out, dq, dk, dv = np.zeros_like(dout), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    lse = np.full(q.shape[1::-1], -np.inf)
    for n in range(len(lengths_q)):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        own = dense(q[rows], k[keys], v[keys], dout[rows], **features)
        out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys] = own
    return out, lse, dq, dk, dv


def check(results, wanted):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), results, wanted):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "features"),
    [
        *(("unequal", features) for features in FEATURES),
        *((kind, features) for kind in LENGTHS if kind != "unequal" for features in FEATURES[2::3]),
    ],
    ids=str,
)
def test_same_as_one_call_per_sequence(kind, features):
    lengths_q, lengths_k = LENGTHS[kind]
    total_q, total_k = sum(lengths_q) + 3, sum(lengths_k) + 5  # tokens behind the last sequence
    q, dout = normal(0, total_q, 4, 16), normal(1, total_q, 4, 16)
    k, v = normal(2, total_k, 2, 16), normal(3, total_k, 2, 16)
    wanted = one_by_one(q, k, v, dout, lengths_q, lengths_k, **features)
    for x, used in ((q, lengths_q), (dout, lengths_q), (k, lengths_k), (v, lengths_k)):
        x[sum(used) :] = np.nan

    @jax.jit
    def run(q, k, v, dout, cu_q, cu_k):
        def call(*x):
            cu = (cu_q, cu_k, 20, 30)
            return flash_attn_varlen_func(*x, *cu, **features, return_attn_probs=True)[:2]

        (out, lse), pull = jax.vjp(call, q, k, v)
        return out, lse, *pull((dout, jnp.zeros_like(lse)))

    args = (q, k, v, dout, cumulative(lengths_q), cumulative(lengths_k))
    results, text = hlo.run_with_text(run, *args)
    check(results, wanted)
    hlo.assert_kernels(text, forward=1, backward=1)


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_packed_forms(features):
    cu, total = cumulative((7, 0, 20, 5)), 35
    qkv, dout = normal(0, total, 3, 4, 16), normal(1, total, 4, 16)
    q, k, v = (qkv[:, n] for n in range(3))
    wanted, *gradients = derivatives.vjp(
        lambda *x: flash_attn_varlen_func(*x, cu, cu.copy(), 20, 20, **features), (q, k, v), dout
    )
    gradients = np.stack(gradients, 1)
    out, gradient = derivatives.vjp(
        lambda x: flash_attn_varlen_qkvpacked_func(x, cu, 20, **features), (qkv,), dout
    )
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(gradient, gradients)

    def kvpacked(q, kv):
        return flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 20, 20, **features)

    out, _, gradient = derivatives.vjp(kvpacked, (q, qkv[:, 1:]), dout)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(gradient, gradients[:, 1:])


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_paged(features):
    lengths_q, lengths_k = (7, 1, 20, 5), (9, 33, 0, 16)
    q, dout = normal(0, 33, 4, 16), normal(1, 33, 4, 16)
    k, v = normal(2, 58, 2, 16), normal(3, 58, 2, 16)
    wanted = one_by_one(q, k, v, dout, lengths_q, lengths_k, **features)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    table = np.array([[3, -9, 99], [6, 1, 4], [-1, -1, -1], [0, 7, 7]], np.int32)
    pages = np.full((2, 8, 16, 2, 16), np.nan)
    for n, (start, length) in enumerate(zip(cu_k, lengths_k)):
        for t in range(length):
            pages[0, table[n, t // 16], t % 16] = k[start + t]
            pages[1, table[n, t // 16], t % 16] = v[start + t]

    def call(q):
        tail = {"block_table": table, "return_attn_probs": True}
        return flash_attn_varlen_func(q, *pages, cu_q, cu_k, 20, 33, **features, **tail)[:2]

    check(derivatives.vjp(call, (q,), (dout, np.zeros((4, 33)))), wanted[:3])


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_seqused(features):
    """Only the leading tokens of each sequence count; alignment is to them."""
    q, k, v = normal(0, 33, 4, 16), normal(2, 58, 2, 16), normal(3, 58, 2, 16)
    cu_q, cu_k = cumulative((7, 1, 20, 5)), cumulative((9, 33, 0, 16))
    used_q, used_k = np.array([3, 1, 0, 5], np.int32), np.array([9, 8, 0, 16], np.int32)
    q[3:7] = q[8:28] = k[17:42] = v[17:42] = np.nan
    tail = {"return_attn_probs": True, "seqused_q": used_q, "seqused_k": used_k}
    call = jax.jit(lambda *x: flash_attn_varlen_func(*x, cu_q, cu_k, 20, 33, **features, **tail))
    out, lse, _ = jax.device_get(call(q, k, v))
    for n in range(4):
        rows = slice(cu_q[n], cu_q[n] + used_q[n])
        keys = slice(cu_k[n], cu_k[n] + used_k[n])
        wanted = dense(q[rows], k[keys], v[keys], q[rows], **features)
        np.testing.assert_allclose(out[rows], wanted[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse[:, rows], wanted[1], rtol=1e-9)
        rest = slice(rows.stop, cu_q[n + 1])
        assert not np.any(out[rest])
        assert np.all(np.isneginf(lse[:, rest]))


@pytest.mark.parametrize("kind", [k for k in LENGTHS if k != "all empty"])
def test_padded_form_gives_the_same(kind):
    """What per-sequence ALiBi slopes go through."""
    lengths_q, lengths_k = LENGTHS[kind]
    total_q, total_k = sum(lengths_q) + 3, sum(lengths_k) + 5
    q, k, v = normal(0, total_q, 4, 16), normal(2, total_k, 2, 16), normal(3, total_k, 2, 16)
    options = {"causal": True, "window": (6, None), "dropout_rate": 0.0}

    @jax.jit
    def both(q, k, v):
        query = module._side("q", cumulative(lengths_q), None, total_q, 20)
        key = module._side("k", cumulative(lengths_k), None, total_k, 30)
        forms = module._packed, module._padded
        return [form(q, k, v, query, key, options, False)[:2] for form in forms]

    packed, padded = both(q, k, v)
    check(padded, packed)


@pytest.mark.parametrize("slopes", [SLOPES, np.stack([SLOPES, SLOPES[::-1], 2 * SLOPES])])
def test_slopes_per_head_and_per_sequence(slopes):
    """Values and gradients as of one dense call per sequence with its own slopes."""
    lengths_q, lengths_k = (7, 1, 20), (9, 30, 4)
    q, dout = normal(0, 28, 4, 16), normal(1, 28, 4, 16)
    k, v = normal(2, 43, 2, 16), normal(3, 43, 2, 16)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    call = lambda *x: flash_attn_varlen_func(*x, cu_q, cu_k, 20, 30, alibi_slopes=slopes)  # noqa: E731
    found = derivatives.vjp(call, (q, k, v), dout)
    for n, own in enumerate(np.broadcast_to(slopes, (3, 4))):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        out, _, *gradients = dense(q[rows], k[keys], v[keys], dout[rows], alibi_slopes=own)
        for a, b, part in zip(found, (out, *gradients), (rows, rows, keys, keys)):
            np.testing.assert_allclose(a[part], b, rtol=1e-9, atol=1e-12)


def test_signs_of_probabilities_are_what_the_call_drops():
    q, k = normal(0, 28, 4, 16), normal(2, 43, 2, 16)
    cu_q, cu_k = cumulative((7, 1, 20)), cumulative((9, 30, 4))
    v = np.zeros((43, 2, 43))
    v[np.arange(43), :, np.arange(43)] = 1  # the output is the matrix of probabilities
    options = {"dropout_key": jax.random.key(1), "return_attn_probs": True}
    run = jax.jit(lambda *x: flash_attn_varlen_func(*x, cu_q, cu_k, 20, 30, 0.4, **options))
    out, _, signed = jax.device_get(run(q, k, v))
    kept = round(0.6 * 65536) / 65536
    for n, (i, j) in enumerate(zip(cu_q[:-1], cu_k[:-1])):
        rows, keys = cu_q[n + 1] - i, cu_k[n + 1] - j
        matrix = out[i : i + rows, :, j : j + keys].swapaxes(0, 1) * kept
        np.testing.assert_allclose(np.maximum(signed[n, :, :rows, :keys], 0), matrix, atol=1e-12)


def test_blocks_of_probabilities():
    matrix = normal(0, 2, 9, 12)
    query = module._side("q", cumulative((4, 0, 5)), None, 9, 5)
    key = module._side("k", cumulative((3, 2, 6)), None, 12, 7)
    blocks = module._blocks(jnp.asarray(matrix), query, key)
    assert blocks.shape == (3, 2, 5, 7)
    np.testing.assert_array_equal(blocks[0, :, :4, :3], matrix[:, :4, :3])
    np.testing.assert_array_equal(blocks[2, :, :5, :6], matrix[:, 4:9, 5:11])
    assert not np.any(blocks[1])
    assert not np.any(blocks[0, :, 4:])
    assert not np.any(blocks[2, :, :, 6:])


BAD = (
    ({"cu_seqlens_q": [1, 4, 8]}, r"cu_seqlens_q must start at 0, got 1"),
    (
        {"cu_seqlens_k": [0, 6, 4]},
        r"cu_seqlens_k must not decrease, got 6 followed by 4 at index 2",
    ),
    ({"cu_seqlens_q": [0, 4, 9]}, r"cu_seqlens_q ends at 9, but the array has 8 tokens"),
    ({"cu_seqlens_q": [0, 4, 6, 8]}, r"cu_seqlens_q has 3 sequences, cu_seqlens_k 2"),
    ({"cu_seqlens_q": [0]}, r"at least one sequence"),
    ({"max_seqlen_q": 3}, r"max_seqlen_q is 3, a sequence has 4 tokens"),
    ({"q": np.ones((1, 8, 2, 16))}, r"q must have shape \[total, heads, head_dim\]"),
    ({"seqused_k": [5, 3], "max_seqlen_k": 4}, r"seqused_k must be 0 to 4, got 3 to 5"),
)


def _arguments():
    x = np.ones((8, 2, 16))
    cu = np.array([0, 4, 8], np.int32)
    lists = {"cu_seqlens_q": cu, "cu_seqlens_k": cu.copy(), "max_seqlen_q": 4, "max_seqlen_k": 4}
    return {"q": x, "k": x, "v": x, **lists}


@pytest.mark.parametrize(("change", "message"), BAD, ids=str)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(**_arguments() | change)


def test_max_seqlen_must_be_static():
    with pytest.raises(TypeError, match="max_seqlen_q must be a Python int"):
        jax.jit(lambda n: flash_attn_varlen_func(**_arguments() | {"max_seqlen_q": n}))(4)


@pytest.mark.parametrize("n", [1, 64])
def test_probabilities_that_would_not_fit(n):
    x = jax.ShapeDtypeStruct((65536, 2, 16), jnp.float32)
    cu = cumulative((65536 // n,) * n)
    tail = {"dropout_key": jax.random.key(0), "return_attn_probs": True}
    with pytest.raises(ValueError, match=r"return_attn_probs would allocate 32\.0 GB"):
        jax.eval_shape(
            lambda x: flash_attn_varlen_func(x, x, x, cu, cu, 65536 // n, 65536 // n, 0.1, **tail),
            x,
        )


def test_block_table_errors():
    pages, base = np.ones((4, 16, 2, 16)), _arguments()
    base |= {"k": pages, "v": pages, "block_table": [[0], [4]]}
    with pytest.raises(ValueError, match=r"block_table must hold ids 0 to 3, got 4"):
        flash_attn_varlen_func(**base)
    with pytest.raises(ValueError, match=r"block_table has room for 16 keys per sequence, 40"):
        flash_attn_varlen_func(**base | {"cu_seqlens_k": [0, 40, 41], "max_seqlen_k": 40})
    with pytest.raises(ValueError, match=r"multiple of 16, got shape \(4, 8, 2, 16\)"):
        flash_attn_varlen_func(**base | {"k": pages[:, :8], "v": pages[:, :8]})


def test_traced_nonsense_is_clamped():
    """Wrong values cannot be an error under jit; nothing out of bounds is read, shapes are kept."""
    base = _arguments()

    @jax.jit
    def run(cu):
        return flash_attn_varlen_func(**base | {"cu_seqlens_q": cu, "cu_seqlens_k": cu})

    for cu in ([5, 2, 8], [0, 4, 2**31 - 1], [-(2**31), -5, 8], [0, 9, 3]):
        out = run(np.array(cu, np.int32))
        assert np.all((out == 0) | np.isclose(out, 1))  # of values that are all 1


def test_traced_values_are_checked_on_request(monkeypatch):
    base = _arguments()
    run = lambda cu: flash_attn_varlen_func(**base | {"cu_seqlens_q": cu})  # noqa: E731
    bad = np.array([0, 6, 4], np.int32)
    jax.jit(run)(bad)
    monkeypatch.setenv("JAX_FLASHATTN_CHECK_VALUES", "1")
    with pytest.raises(Exception, match="cu_seqlens_q must not decrease, got 6 followed by 4"):
        jax.block_until_ready(jax.jit(lambda cu: run(cu))(bad))
    jax.effects_barrier()


def test_ids_of_the_two_sides_pair_by_number():
    ids = packing.segment_ids_from_cu_seqlens(cumulative((0, 2, 0, 1)), 4)
    assert ids.tolist() == [2, 2, 4, 0]


def test_vmap():
    """Over arrays and over lengths, with one program for all."""
    q, k = jnp.asarray(normal(0, 3, 12, 4, 16)), jnp.asarray(normal(1, 3, 12, 2, 16))
    cu = np.array([[0, 4, 12], [0, 0, 9], [0, 11, 11]], np.int32)
    call = lambda q, k, cu: flash_attn_varlen_func(q, k, k, cu, cu, 12, 12, causal=True)  # noqa: E731
    for axes, lengths in (((0, 0, None), cu[0]), ((0, 0, 0), cu), ((None, None, 0), cu)):
        x, y = (q, k) if axes[0] == 0 else (q[0], k[0])
        out = jax.jit(jax.vmap(call, axes))(x, y, lengths)
        for n in range(3):
            one = [a if axis is None else a[n] for a, axis in zip((x, y, lengths), axes)]
            np.testing.assert_allclose(out[n], call(*one), rtol=1e-9, atol=1e-12)
