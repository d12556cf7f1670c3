"""C++ of ours outside an extension: compiled by the system's compiler, for one test module."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def compile_cxx(output: pathlib.Path, sources, *flags: str, untested: str) -> pathlib.Path:
    """Builds `output`, with csrc on the include path; skips where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip(f"no C++ compiler: {untested} on this machine")
    command = [compiler, "-std=c++17", *flags, "-I", ROOT / "csrc", *sources, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output
