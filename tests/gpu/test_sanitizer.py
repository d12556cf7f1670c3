"""compute-sanitizer over every instance of the Hopper kernels; "not run" where it cannot run."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from gpu.test_attention import platform  # noqa: F401  the fixture

PROGRAM = pathlib.Path(__file__).with_name("every_instance.py")
# Small enough to finish under the tool, so that a failure of this one is the tool's.
TRIVIAL = "import jax; print(jax.jit(lambda x: x + 1)(jax.numpy.ones(8)).sum())"
OPTIONS = {"memcheck": (), "initcheck": (), "synccheck": (), "racecheck": ()}
FOUND = 86  # exit status


def sanitize(tool: str, *program: str) -> subprocess.CompletedProcess:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    command += ["--kernel-name", "kernel_substring=jax_flashattn", *OPTIONS[tool]]
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",  # every buffer an allocation of its own
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    return subprocess.run(
        [*command, sys.executable, *program], env=environment, capture_output=True, text=True
    )


@functools.cache
def why_not() -> str | None:
    """Why the tool cannot run here, or None."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on the PATH"
    tried = sanitize("memcheck", "-c", TRIVIAL)
    return None if tried.returncode == 0 else tried.stdout[-300:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", OPTIONS)
def test_no_instance_is_reported(tool, platform):  # noqa: F811
    if platform == "cpu":
        pytest.skip("a GPU's tool")
    if reason := why_not():
        pytest.skip(f"not run: {reason}")
    done = sanitize(tool, str(PROGRAM))
    assert "instances on" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-6000:]
