"""Memory is O(S): nothing of S x S is ever allocated."""

import jax
import jax.numpy as jnp
import pytest
from support import hlo, programs

from jax_flashattn import flash_attention

S = 16384


def test_a_long_sequence_needs_no_square(tmp_path):
    """16384 causal rows with gradients; one byte per pair would be 268 MB."""
    found = programs.run("memory", tmp_path / "out.npz", str(S))
    text = str(found["text"])
    hlo.assert_kernels(text, forward=1, backward=1)
    hlo.assert_no_square(text, S, S)
    assert found["temporary"] < S * S / 4
    assert found["growth"] < S * S / 4


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (100, 100)}, {"segment_ids": True}], ids=str
)
def test_temporary_memory_is_linear(options):
    """Twice the length, at most twice the memory, for every way to write a mask.

    Of lengths whose accumulators are not kept below what the C library recycles (_lowering.py).
    """

    def temporary(s):
        x = jax.ShapeDtypeStruct((1, s, 2, 32), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((1, s), jnp.int32)

        def loss(q, k, v, ids):
            given = options | ({"segment_ids": ids} if "segment_ids" in options else {})
            return flash_attention(q, k, v, **given).astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4 * S) <= 2.1 * temporary(2 * S)
