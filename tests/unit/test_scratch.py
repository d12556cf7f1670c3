"""The CPU backward writes no accumulator but its own, whatever the order of its tasks."""

import ctypes
import itertools

import pytest
from support.compiled import ROOT, compile_cxx


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    library = compile_cxx(
        tmp_path_factory.mktemp("probe") / "scratch_probe.so",
        [ROOT / "tests/support/scratch_probe.cc", ROOT / "csrc/cpu/backward.cc"],
        *("-O1", "-w", "-fPIC", "-shared", "-DFLASH_ISA=baseline"),
        untested="the backward's scratch is NOT watched",
    )
    return ctypes.CDLL(str(library))


def test_tasks_write_their_own_accumulators_alone(probe):
    """docs/postmortems/odd_key_tiles.md: odd and even keys, first keys, last keys and parts."""
    for sq, sk, left, parts in itertools.product((1, 24), (39, 40, 97, 130), (-1, 4, 9), (1, 3)):
        sizes = [ctypes.c_int64(n) for n in (3, sq, sk, 8)]
        for right in (-1, 0):
            wrong = probe.probe_scratch(*sizes, left, right, ctypes.c_int64(parts))
            assert wrong == 0, f"{wrong} at sq={sq} sk={sk} window=({left}, {right}) x {parts}"
