"""examples/long_lora.py: only what shall be trained is trained, and the mask it draws."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import byte_lm
import long_lora
import train_lm


@pytest.fixture(scope="module")
def config():
    small = byte_lm.make_config("tiny", seq_len=64, steps=4)
    return dataclasses.replace(small, layers=2, width=32, query_heads=2, kv_heads=1, window=16)


def test_run_and_run_again_from_the_saved_base_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm, "EVAL_BATCHES", 2)
    tuned = {}
    fine_tune = long_lora.fine_tune

    def keep(config, params, documents, implementation):
        tuned[implementation] = fine_tune(config, params, documents, implementation)
        tuned["base"] = params
        return tuned[implementation]

    monkeypatch.setattr(long_lora, "fine_tune", keep)
    first = long_lora.run(config, 6, tmp_path / "base", tmp_path)
    assert len(first["perplexity"]) == 4
    assert first["contexts"] == [64, 256]
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert (tmp_path / "mask.png").stat().st_size > 1000

    for implementation in ("shifted", "kernel"):
        before, after = (
            {long_lora._name(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(params)}
            for params in (tuned["base"], tuned[implementation][0])
        )
        changed = {name for name in before if np.any(before[name] != after[name])}
        frozen = {name for name in before if "mlp_in" in name or "mlp_out" in name}
        assert len(frozen) == 4
        assert changed == set(before) - frozen
        for name in changed:
            if "attention_in" in name or "attention_out" in name:
                assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-5) <= long_lora.RANK
    embeddings = [tuned[name][0]["embed"]["embedding"] for name in ("shifted", "kernel")]
    assert np.any(embeddings[0] != embeddings[1])

    monkeypatch.setattr(train_lm, "compile_train_step", lambda *_: None)  # read, not trained
    again = long_lora.base_model(config, train_lm.read_corpus()[0], tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, again, tuned["base"])


def test_updates_begin_at_the_base_model(config):
    params = byte_lm.init_state(config)["params"]
    updates = long_lora.init_updates(params, jax.random.key(0))
    assert sum(isinstance(x, dict) for x in updates.values()) == 4
    jax.tree.map(np.testing.assert_array_equal, long_lora.updated(params, updates), params)


def test_the_drawn_mask():
    i, j = np.arange(20)[:, None], np.arange(20)
    for half, shift in enumerate((0, 3)):
        wanted = (j <= i) & ((i + shift) // 6 == (j + shift) // 6)
        np.testing.assert_array_equal(long_lora.visible(20, 6)[half], wanted)
