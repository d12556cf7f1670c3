"""The old binding's two functions."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn import flash_attention, flash_mha, flash_mha_varlen

SIGNATURES = {  # reference: flash-attn-jax
    flash_mha: "(q, k, v, softmax_scale=None, is_causal=False, window_size=(-1, -1))",
    flash_mha_varlen: (
        "(q, k, v, seqlens_q, seqlens_k=None, *, max_seqlen_q=-1, max_seqlen_k=-1, "
        "softmax_scale=None, is_causal=False, window_size=(-1, -1))"
    ),
}


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("function", SIGNATURES)
def test_signature(function):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[function]


def test_flash_mha():
    q, k, v = _normal(0, 2, 20, 4, 16), _normal(1, 2, 31, 2, 16), _normal(2, 2, 31, 2, 16)
    out = flash_mha(q, k, v, 0.3, True, (6, -1))
    wanted = flash_attention(q, k, v, scale=0.3, causal=True, window=(6, None))
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("one_side", [True, False])
@pytest.mark.parametrize("longest", [{}, {"max_seqlen_q": 13, "max_seqlen_k": 20}])
def test_flash_mha_varlen(one_side, longest):
    q, k, v = _normal(0, 20, 4, 16), _normal(1, 31, 2, 16), _normal(2, 31, 2, 16)
    seqlens_q, seqlens_k = np.array([0, 7, 20]), np.array([0, 11, 31])
    if one_side:
        k, v, seqlens_k = k[:20], v[:20], None
    out = flash_mha_varlen(q, k, v, seqlens_q, seqlens_k, is_causal=True, **longest)
    cu_k = seqlens_q if one_side else seqlens_k
    for n in range(2):
        rows, keys = slice(*seqlens_q[n : n + 2]), slice(*cu_k[n : n + 2])
        wanted = flash_mha(q[None, rows], k[None, keys], v[None, keys], is_causal=True)
        np.testing.assert_allclose(out[rows], wanted[0], atol=2e-6)


def test_errors():
    x = jnp.ones((4, 1, 16))
    with pytest.raises(ValueError, match="cu_seqlens_q ends at 5"):
        flash_mha_varlen(x, x, x, [0, 5])
    with pytest.raises(ValueError, match="max_seqlen_q is 2, a sequence has 4 tokens"):
        flash_mha_varlen(x, x, x, [0, 4], max_seqlen_q=2)
