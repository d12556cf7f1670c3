"""What a newcomer waits for: a training step from a clean clone, the tests; the wheel's size."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import record

PYTHON = ".venv/bin/python"


def run() -> None:
    """README's commands on a clean clone, the first with one step: results/first_step.json.

    pip takes packages from its cache where it has them; the CPU extension is compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone = pathlib.Path(folder) / "clone"
        seconds = {}

        def timed(name: str, *command: str) -> None:
            begin = time.perf_counter()
            where = clone if clone.exists() else folder
            environment = os.environ | {"JAX_FLASHATTN_CUDA": "off"}
            subprocess.run(command, cwd=where, env=environment, check=True)
            seconds[name] = round(time.perf_counter() - begin, 1)
            print(f"{name}: {seconds[name]} s", flush=True)

        timed("clone", "git", "clone", "-q", str(record.ROOT), str(clone))
        timed("venv", sys.executable, "-m", "venv", str(clone / ".venv"))
        timed("install", PYTHON, "-m", "pip", "install", "-q", "-e", ".[examples]")
        timed("one step", PYTHON, "examples/train_lm.py", "--steps", "1", "--out", folder)
        row = {"seconds": dict(seconds), "total": round(sum(seconds.values()), 1)}
        timed("wheel", PYTHON, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".")
        timed("test packages", PYTHON, "-m", "pip", "install", "-q", "-e", ".[test]")
        timed("tests", PYTHON, "-m", "pytest", "-q")
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        row |= {"wheel megabytes": round(wheel.stat().st_size / 1e6, 2), "tests": seconds["tests"]}
    print(row)
    print("written", record.write("first_step", [row]))
