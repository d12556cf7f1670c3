"""Shifted sparse attention against its definition and against flash-attn's construction of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import derivatives, hlo, oracle

from jax_flashattn import (
    flash_attention,
    flash_attn_varlen_qkvpacked_func,
    shifted_sparse_attention,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def see(positions: np.ndarray, ids: np.ndarray, group: int, shift: int) -> np.ndarray:
    """[s, s]: same document, same group, not later; by the words of the paper."""
    number = (positions + shift) // group
    same = (ids[:, None] == ids[None]) & (ids != 0)[:, None] & (number[:, None] == number[None])
    return same & (np.arange(len(ids))[None] <= np.arange(len(ids))[:, None])


def documents(lengths: tuple, s: int) -> tuple[np.ndarray, np.ndarray]:
    """positions and ids of one row; a negative length is padding."""
    positions, ids = np.zeros(s, int), np.zeros(s, np.int32)
    at = 0
    for n, length in enumerate(lengths):
        if length > 0:
            positions[at : at + length], ids[at : at + length] = np.arange(length), n + 1
        at += abs(length)
    return positions, ids


# Options a call may have; those of heads are of all four of them.
SLOPES = 2.0 ** -np.arange(1, 5, dtype=np.float32)
OPTIONS = (
    {"scale": 0.3},
    {"causal": False},
    {"deterministic": True},
    {"softcap": 2.0},
    {"alibi_slopes": SLOPES},
    {"alibi_slopes": np.stack([SLOPES, SLOPES[::-1]])},
)

ROWS = {
    "whole": (((48,), (48,)), "none"),
    "ragged": (((48,), (29,)), "lengths"),
    "padded on the left": (((-9, 39), (-20, 28)), "ids"),
    "packed": (((20, 5, 23), (-3, 30, 4)), "ids"),
}


HEADS, GROUPS = ((4, 4), (4, 2), (4, 1), (6, 3)), (16, 10, 64)


@pytest.mark.parametrize(
    ("kind", "hq", "hk", "group"),
    [(k, *h, GROUPS[(i + j) % 3]) for i, k in enumerate(ROWS) for j, h in enumerate(HEADS)],
)
def test_definition(kind, hq, hk, group):
    """Values and gradients in float64 against both halves' masks; padding holds NaN."""
    lengths, form = ROWS[kind]
    rows = [documents(row, 48) for row in lengths]
    ids = np.stack([ids for _, ids in rows])
    clean = {
        name: normal(n, 2, 48, h, 16).astype(np.float64)
        for n, (name, h) in enumerate((("query", hq), ("key", hk), ("value", hk), ("dout", hq)))
    }
    clean["dlse"] = normal(5, 2, hq, 48).astype(np.float64)
    wanted = []
    for half, shift in enumerate((0, group // 2)):
        visible = np.stack([see(positions, ids, group, shift) for positions, ids in rows])
        heads = slice(half * hq // 2, (half + 1) * hq // 2)
        repeated = {n: np.repeat(clean[n], hq // hk, 2)[:, :, heads] for n in ("key", "value")}
        own = {n: clean[n][:, :, heads] for n in ("query", "dout")}
        own["dlse"] = np.where(ids[:, None] != 0, clean["dlse"][:, heads], 0)
        wanted.append(oracle.attention(repeated | own, visible, 0.25))
    wanted = {
        name: np.concatenate([w[name] for w in wanted], axis=1 if name == "lse" else 2)
        for name in wanted[0]
    }
    for name in ("dk", "dv"):
        wanted[name] = wanted[name].reshape(2, 48, hk, hq // hk, 16).sum(3)

    mask = {
        "none": {},
        "lengths": {"lengths": (ids != 0).sum(1).astype(np.int32)},
        "ids": {"segment_ids": ids},
    }[form]
    given = {n: x.copy() for n, x in clean.items()}
    for name in ("query", "key", "value", "dout"):
        given[name][ids == 0] = np.nan
    with jax.enable_x64(True):
        results = derivatives.vjp(
            lambda q, k, v: shifted_sparse_attention(q, k, v, group, **mask, return_lse=True),
            tuple(given[n] for n in ("query", "key", "value")),
            (given["dout"], given["dlse"]),
        )
    for name, x in zip(("out", "lse", "dq", "dk", "dv"), results):
        np.testing.assert_allclose(x, wanted[name], rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_reach_the_heads_they_belong_to(options):
    """Each half of the heads is one call over the documents that its groups are."""
    q, k, v = normal(0, 2, 48, 4, 16), normal(1, 2, 48, 2, 16), normal(2, 2, 48, 2, 16)
    out, lse = shifted_sparse_attention(q, k, v, 16, **options, return_lse=True)
    for half, shift in enumerate((0, 8)):
        ids = np.broadcast_to((np.arange(48, dtype=np.int32) + shift) // 16 + 1, (2, 48))
        heads, own = slice(2 * half, 2 * half + 2), {"causal": True} | options
        if "alibi_slopes" in own:
            own["alibi_slopes"] = own["alibi_slopes"][..., heads]
        wanted = flash_attention(
            q[:, :, heads],
            *(x[:, :, half : half + 1] for x in (k, v)),
            segment_ids=ids,
            return_lse=True,
            **own,
        )
        np.testing.assert_allclose(out[:, :, heads], wanted[0], atol=2e-6)
        np.testing.assert_allclose(lse[:, heads], wanted[1], atol=2e-6)


@pytest.mark.parametrize(("s", "group"), [(128, 32), (8192, 2048)])
def test_the_construction_with_varlen(s, group):
    """flash-attn's way: both halves of the heads in one varlen call (LongLoRA issue 126)."""
    qkv = normal(0, 1, s, 3, 2, 16)
    starts = [*range(0, s, group), *range(s, 2 * s, group)]
    starts = [x if x <= s else x - group // 2 for x in starts]
    cu_seqlens = np.array([*starts, 2 * s - group // 2, 2 * s], np.int32)
    if s == 8192:
        wanted = [0, 2048, 4096, 6144, 8192, 9216, 11264, 13312, 15360, 16384]
        assert cu_seqlens.tolist() == wanted
    halves = np.concatenate([qkv[0, :, :, :1], qkv[0, :, :, 1:]])
    out = flash_attn_varlen_qkvpacked_func(halves, cu_seqlens, group, causal=True)
    wanted = np.concatenate([out[:s], out[s:]], axis=1)
    result = shifted_sparse_attention(*(qkv[:, :, n] for n in range(3)), group)
    np.testing.assert_allclose(result[0], wanted, atol=2e-6)


def test_a_later_token_never_changes_an_earlier_output():
    q, k, v = normal(0, 2, 80, 4, 16), normal(1, 2, 80, 2, 16), normal(2, 2, 80, 2, 16)
    call = jax.jit(lambda *x: shifted_sparse_attention(*x, 32))
    before = np.asarray(call(q, k, v))
    for t in (0, 15, 16, 31, 32, 47, 63, 79):
        changed = [x.copy() for x in (q, k, v)]
        for x in changed:
            x[:, t] += 3
        after = np.asarray(call(*changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.any(after[:, t] != before[:, t])


def test_heads_of_the_second_half_carry_information_over_a_group_border():
    q, k, v = (normal(n, 1, 64, 2, 16) for n in range(3))
    value = lambda x: shifted_sparse_attention(q, k, x, 32)[0, 33].sum(-1)  # noqa: E731
    flows = np.any(np.asarray(jax.jacrev(value)(v)) != 0, axis=(1, 4))[:, :, [0, 1]]
    assert np.flatnonzero(flows[0, :, 0]).tolist() == [32, 33]
    assert np.flatnonzero(flows[1, :, 1]).tolist() == list(range(16, 34))


def test_one_call_without_square_buffers():
    x = jnp.ones((2, 256, 4, 16))
    loss = jax.jit(jax.grad(lambda x: shifted_sparse_attention(x, x, x, 64).sum()))
    text = hlo.compiled_text(loss, x)
    hlo.assert_kernels(text, forward=1, backward=1)
    hlo.assert_no_square(text, 256, 256)


def test_errors():
    x = jnp.ones((1, 8, 2, 16))
    with pytest.raises(ValueError, match="group_size must be even and positive, got 5"):
        shifted_sparse_attention(x, x, x, 5)
    with pytest.raises(TypeError, match="group_size must be a Python int"):
        shifted_sparse_attention(x, x, x, 4.0)
    with pytest.raises(ValueError, match="query heads must be even, got 1"):
        shifted_sparse_attention(x[:, :, :1], x[:, :, :1], x[:, :, :1], 4)
    with pytest.raises(ValueError, match="same length, got 8 and 4"):
        shifted_sparse_attention(x, x[:, :4], x[:, :4], 4)
    ids = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="one array"):
        shifted_sparse_attention(x, x, x, 4, segment_ids=(ids, ids))
