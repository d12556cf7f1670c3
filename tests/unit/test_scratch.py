"""The CPU backward writes no accumulator but its own, whatever the order of its tasks."""

import ctypes
import itertools
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: the backward's scratch is NOT watched on this machine")
    library = tmp_path_factory.mktemp("probe") / "scratch_probe.so"
    sources = [ROOT / "tests/support/scratch_probe.cc", ROOT / "csrc/cpu/backward.cc"]
    command = [compiler, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DFLASH_ISA=baseline"]
    command += ["-I", ROOT / "csrc", *sources, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def test_tasks_write_their_own_accumulators_alone(probe):
    """docs/postmortems/odd_key_tiles.md: odd and even keys, first keys, last keys and parts."""
    for sq, sk, left, parts in itertools.product((1, 24), (39, 40, 97, 130), (-1, 4, 9), (1, 3)):
        sizes = [ctypes.c_int64(n) for n in (3, sq, sk, 8)]
        for right in (-1, 0):
            wrong = probe.probe_scratch(*sizes, left, right, ctypes.c_int64(parts))
            assert wrong == 0, f"{wrong} at sq={sq} sk={sk} window=({left}, {right}) x {parts}"
