"""examples/train_lm.py: one curve with both attentions, exact resume, no S x S in its step."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from support import hlo

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import byte_lm
import train_lm

SEQ = 320


def config(steps):
    small = byte_lm.make_config("tiny", seq_len=SEQ, steps=steps)
    return dataclasses.replace(small, schedule_steps=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the example in its own folder; results by (steps, implementation).

    For time, only the run of 12 steps makes a sample and compares implementations.
    """
    done = {}

    def runner(steps, implementation="kernel", out=None, resume=False):
        key = (steps, implementation, out)
        if key not in done:
            folder = out or tmp_path_factory.mktemp("train_lm")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_lm, "EVAL_BATCHES", 2)
                if key != (12, "kernel", None):
                    patch.setattr(train_lm, "generate", lambda *_: "")
                    patch.setattr(train_lm, "compare_implementations", lambda *_: {})
                done[key] = train_lm.run(config(steps), folder, implementation, resume)
        return done[key]

    return runner


def test_kernel_and_xla_give_the_same_curve(run):
    kernel, xla = run(12)["losses"], run(12, "xla")["losses"]
    assert len(kernel) == 12
    np.testing.assert_allclose(kernel, xla, rtol=2e-4)
    assert kernel[-1] < kernel[0] - 1, "it does not learn"
    compared = run(12)["comparison"]
    np.testing.assert_allclose(compared["kernel"]["losses"], compared["xla"]["losses"], rtol=2e-4)
    assert run(12)["sample"].startswith("def ")


def test_resume_continues_exactly(run, tmp_path):
    run(5, out=tmp_path)
    resumed = run(12, out=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed["losses"], run(12)["losses"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["losses"] == resumed["losses"]
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000


def test_the_train_step_runs_our_kernels_and_no_square():
    layers = config(1).layers
    text = train_lm.compile_train_step(config(1), "kernel").as_text()
    hlo.assert_kernels(text, forward=layers, backward=layers)
    hlo.assert_no_square(text, SEQ, SEQ)
    plain = train_lm.compile_train_step(config(1), "xla").as_text()
    with pytest.raises(AssertionError):  # the check can fail
        hlo.assert_no_square(plain, SEQ, SEQ)


def test_positions_and_segments_restart_per_document():
    batch = next(iter(train_lm.packed_batches(train_lm.read_corpus()[0], config(1))))
    ids, positions = np.asarray(batch["segment_ids"]), np.asarray(batch["positions"])
    assert ids.shape == (1, SEQ)
    assert jax.numpy.unique(ids).size > 1
    begins = np.diff(ids, axis=1) != 0
    real = ids[:, 1:] != 0
    assert (positions[:, 1:][begins & real] == 0).all()
    assert (np.diff(positions, axis=1)[~begins & real] == 1).all()
