"""compute-sanitizer over every instance of the Hopper kernels; "not run" where it cannot run.

racecheck is not among its tools: it takes what one warp hands to another through an mbarrier for a
race, such as the limits of rows that scouts write and consumers read.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from gpu.every_instance import HEAD_DIMS
from gpu.test_attention import platform  # noqa: F401  the fixture

PROGRAM = pathlib.Path(__file__).with_name("every_instance.py")
# Small enough to finish under the tool, so that a failure of this one is the tool's.
TRIVIAL = "import jax; print(jax.jit(lambda x: x + 0)(jax.numpy.ones(8)).sum())"
OPTIONS = {
    "memcheck": (),
    "initcheck": (),
    # It takes bar.sync of one barrier at two addresses for divergence, also in a kernel of ten
    # lines; PTX allows that, and the two roles of this kernel meet so.
    "synccheck": ("--kernel-name-exclude", "kernel_substring=backward_wide"),
}
TRIES = 3  # the tool itself crashes now and then while the program starts
# It mostly does where XLA compiles in several threads, or replays graphs.
FLAGS = "--xla_gpu_force_compilation_parallelism=1 --xla_gpu_enable_command_buffer="
ENVIRONMENT = {"XLA_FLAGS": FLAGS, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def sanitize(tool: str, *program: str) -> subprocess.CompletedProcess:
    """The tool's run over a program, for the kernels of this project alone."""
    command = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "no", "--print-limit", "0"]
    command += ["--kernel-name", "kernel_substring=jax_flashattn", *OPTIONS[tool]]
    command += [sys.executable, *program]
    for _ in range(TRIES):
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            break
    return done


@functools.cache
def why_not() -> str | None:
    """Why the tool cannot run here, or None."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on the PATH"
    tried = sanitize("memcheck", "-c", TRIVIAL)
    return None if "8.0" in tried.stdout else tried.stdout[-300:] + tried.stderr[-300:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tool", OPTIONS)
def test_no_instance_is_reported(tool, head_dim, platform):  # noqa: F811
    if platform == "cpu":
        pytest.skip("a GPU's tool")
    if reason := why_not():
        pytest.skip(f"not run: {reason}")
    done = sanitize(tool, str(PROGRAM), str(head_dim))
    reports = [line for line in done.stdout.splitlines() if "jax_flashattn" in line]
    assert not reports, "\n".join(reports[:20])
    if "instances on" not in done.stdout:
        pytest.skip(f"not run: the tool ended with {done.returncode}")
