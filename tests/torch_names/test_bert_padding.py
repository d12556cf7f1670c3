"""Padding helpers against loops over tokens, and as flash-attn's users combine them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import derivatives

from jax_flashattn import (
    bert_padding,
    flash_attention,
    flash_attn_varlen_qkvpacked_func,
    packing,
)

MASK = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
IN_LENGTH = np.array(
    [[2, 3, 0, 0, 0, 0], [3, 0, 2, 0, 0, 0], [0] * 6, [6, 0, 0, 0, 0, 0]], np.int32
)
WRAPS = pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])


def maybe_jit(function, traced):
    """Results and the static ints among them."""
    if not traced:
        return function
    static = {}

    def arrays(*args):
        results = function(*args)
        static.update({n: x for n, x in enumerate(results) if isinstance(x, int)})
        return [jnp.zeros(()) if isinstance(x, int) else x for x in results]

    return lambda *args: [static.get(n, x) for n, x in enumerate(jax.jit(arrays)(*args))]


@WRAPS
@pytest.mark.parametrize("max_tokens", [None, 11, 15])
@pytest.mark.parametrize("unused", [False, True])
def test_unpad_input(traced, max_tokens, unused):
    x = np.random.default_rng(0).standard_normal((4, 5, 2, 3)).astype(np.float32)
    unused_mask = np.zeros_like(MASK)
    if unused:
        unused_mask[0, 3:] = unused_mask[1, 0] = 1
        max_tokens = None if max_tokens is None else max_tokens + 3
    room = 20 if max_tokens is None else max_tokens
    unpad = maybe_jit(lambda *args: bert_padding.unpad_input(*args, max_tokens=max_tokens), traced)
    result, indices, cu_seqlens, longest, used = unpad(x, MASK, unused_mask)
    real = np.flatnonzero(MASK + unused_mask)
    assert indices.tolist() == [*real, *[20] * (room - real.size)]
    np.testing.assert_array_equal(result[: real.size], x.reshape(20, 2, 3)[real])
    assert not np.any(result[real.size :])
    assert cu_seqlens.tolist() == [0, *np.cumsum((MASK + unused_mask).sum(1))]
    assert longest == 5
    assert used.tolist() == MASK.sum(1).tolist()
    padded = bert_padding.pad_input(result, indices, 4, 5)
    np.testing.assert_array_equal(padded, np.where((MASK + unused_mask)[..., None, None], x, 0))


def test_longest_is_exact_where_known():
    x, mask = jnp.ones((2, 9, 1)), np.arange(9)[None] < np.array([[4], [2]])
    assert bert_padding.unpad_input(x, mask)[3] == 4
    known_under_jit = []
    jax.jit(lambda x: known_under_jit.append(bert_padding.unpad_input(x, mask)[3]))(x)
    assert known_under_jit == [4]
    lengths = np.array([[1, 3, 2, *[0] * 6], [2, 0, *[0] * 7]], np.int32)
    assert bert_padding.unpad_input_for_concatenated_sequences(x, lengths)[3] == 3


@WRAPS
def test_unpad_input_for_concatenated_sequences(traced):
    x = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
    unpad = maybe_jit(
        lambda *args: bert_padding.unpad_input_for_concatenated_sequences(
            *args, max_tokens=18, max_sequences=7
        ),
        traced,
    )
    result, indices, cu_seqlens, longest = unpad(x, IN_LENGTH)
    real = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 18, 19, 20, 21, 22, 23]
    assert indices.tolist() == [*real, 24, 24]
    np.testing.assert_array_equal(result[:16], x.reshape(24, 3)[real])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16, 16, 16]
    assert longest == 6


def test_gradients_go_back_to_the_real_tokens():
    x = jnp.ones((4, 5, 3))
    weight = jnp.arange(60.0).reshape(4, 5, 3)

    def loss(x):
        unpadded, indices, *_ = bert_padding.unpad_input(x, MASK, max_tokens=13)
        return jnp.sum(bert_padding.pad_input(unpadded, indices, 4, 5) * weight)

    np.testing.assert_array_equal(jax.grad(loss)(x), np.where(MASK[..., None], weight, 0))


def test_the_recipe_of_concatenated_sequences():
    """unpad, varlen, pad is what segment ids are, gradients too (flash-attention issue 432)."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 3, 2, 16)), jnp.float32)
    ids = packing.segment_ids_from_attention_mask_in_length(IN_LENGTH)

    def by_recipe(qkv):
        unpadded, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(
            qkv, IN_LENGTH
        )
        out = flash_attn_varlen_qkvpacked_func(unpadded, cu, longest, 0.0, None, True)
        return bert_padding.pad_input(out, indices, 4, 6)

    def by_ids(qkv):
        return flash_attention(*(qkv[:, :, n] for n in range(3)), causal=True, segment_ids=ids)

    recipe, native = (derivatives.vjp(f, (x,), lambda out: 2 * out) for f in (by_recipe, by_ids))
    np.testing.assert_allclose(recipe[0], native[0], atol=2e-6)
    np.testing.assert_allclose(recipe[1], native[1], atol=1e-5)


def test_errors():
    x = jnp.ones((4, 5, 3))
    with pytest.raises(ValueError, match="the batch has 11 tokens, max_tokens is 10"):
        bert_padding.unpad_input(x, MASK, max_tokens=10)
    with pytest.raises(ValueError, match=r"attention_mask must have the first two dimensions"):
        bert_padding.unpad_input(x, MASK[:, :4])
    with pytest.raises(ValueError, match="has 5 sequences, max_sequences is 3"):
        bert_padding.unpad_input_for_concatenated_sequences(
            jnp.ones((4, 6, 3)), IN_LENGTH, max_sequences=3
        )
    with pytest.raises(ValueError, match="indices must be 0 to 20, got -1 to 3"):
        bert_padding.pad_input(jnp.ones((2, 3)), np.array([-1, 3]), 4, 5)


def test_traced_overflow_drops_the_last_tokens():
    x = np.arange(1.0, 21).reshape(4, 5, 1)
    unpad = jax.jit(lambda mask: bert_padding.unpad_input(x, mask, max_tokens=5)[:3])
    result, indices, cu_seqlens = unpad(MASK)
    assert result[:, 0].tolist() == [1, 2, 3, 11, 13]
    assert indices.tolist() == [0, 1, 2, 10, 12]
    assert cu_seqlens.tolist() == [0, 3, 3, 5, 5]
