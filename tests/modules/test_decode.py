"""examples/decode.py: shared pages, ragged prompts, and a check that can fail."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
from support import hlo

from jax_flashattn import _native

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import byte_lm
import decode
import long_lora
import train_lm

PREFIX = b"import os\nimport sys\n\n# shared by all of them\n"  # two pages and a bit
PROMPTS = [b"def ", b"class A:\n    x = ", b"x"]


@pytest.fixture(scope="module")
def config():
    small = byte_lm.make_config("tiny", seq_len=64, steps=3)
    return dataclasses.replace(small, layers=2, width=32, query_heads=2, kv_heads=1, window=16)


@pytest.fixture(scope="module")
def params(config, tmp_path_factory):
    """Trained and saved, then read again as a second run of the example does."""
    folder = tmp_path_factory.mktemp("base")
    documents = train_lm.read_corpus()[0]
    trained = long_lora.base_model(config, documents, folder)
    read = long_lora.base_model(config, documents, folder)
    jax.tree.map(np.testing.assert_array_equal, trained, read)
    return read


def test_it_generates_what_a_full_forward_pass_would(config, params):
    found = decode.run(config, params, PREFIX, PROMPTS, 12, temperature=1e-6)
    for text, prompt in zip(found["texts"], PROMPTS):
        assert text.startswith(PREFIX + prompt)
        assert len(text) == len(PREFIX + prompt) + 12
    assert 0 < found["difference"] < 1e-4
    assert found["tokens_per_second"] > 0
    assert found["unshared_pages"] - found["pages"] == 2 * (len(PREFIX) // decode.PAGE)
    # Greedy, byte by byte, without a cache.
    text = found["texts"][1]
    tokens = np.array([list(text)], np.int32)
    ids, positions = np.ones_like(tokens), np.arange(tokens.size, dtype=np.int32)[None]

    @jax.jit
    def forward(params):
        model = byte_lm.nnx.merge(byte_lm.model_graph(config), params)
        return model(tokens, ids, positions, implementation="kernel")[0]

    logits = forward(params)
    assert bytes(np.argmax(logits[-13:-1], axis=-1).astype(np.uint8)) == text[-12:]


def test_requests_share_the_pages_of_their_prefix(config):
    request = decode.open_cache(config, 3, shared=32, own=40)
    assert request.table.shape == (3, 5)
    assert (request.table[:, :2] == request.table[0, :2]).all()
    own = request.table[:, 2:].ravel()
    assert np.unique(np.concatenate([own, request.table[0, :2]])).size == own.size + 2
    assert len(request.caches) == config.layers


def test_the_loop_keeps_the_cache_in_place(config, params):
    request = decode.open_cache(config, 3, shared=32, own=4000)
    generate = decode.make_generator(config, request.table, 8, 1.0)
    logits, lengths = np.zeros((3, 256), np.float32), np.full(3, 32, np.int32)
    compiled = generate.lower(params, logits, request.caches, lengths, jax.random.key(0)).compile()
    text = compiled.as_text()
    assert hlo.count_calls(text, _native.APPEND) == 2 * config.layers
    assert hlo.count_calls(text, _native.CACHED) == config.layers
    assert compiled.memory_analysis().temp_size_in_bytes < request.caches[0][0].nbytes


def test_a_wrong_cache_is_noticed(config, params, monkeypatch):
    right = decode.flash_attn_with_kvcache

    def wrong(*args, cache_seqlens, **options):
        return right(*args, cache_seqlens=cache_seqlens + (args[0].shape[1] == 1), **options)

    monkeypatch.setattr(decode, "flash_attn_with_kvcache", wrong)
    with pytest.raises(AssertionError, match="logits differ by"):
        decode.run(config, params, PREFIX, PROMPTS, 12)
