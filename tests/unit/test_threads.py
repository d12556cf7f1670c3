"""S14: results do not depend on the number of threads."""

import numpy as np
from support import programs


def test_thread_counts_give_the_same_bits(tmp_path):
    """NPROC sets the size of XLA's pool; the first run has one thread, so no parallel loop."""
    runs = {n: programs.run("results", tmp_path / f"{n}.npz", NPROC=str(n)) for n in (1, 2, 5)}
    pools = [int(runs[n].pop("threads")) for n in runs]
    assert len(set(pools)) == 3 or pools == [0, 0, 0], f"pools of {pools} threads test nothing"
    for n in (2, 5):
        assert runs[n].keys() == runs[1].keys()
        for name, x in runs[1].items():
            assert np.array_equal(x, runs[n][name]), f"{name} differs with {n} threads"
