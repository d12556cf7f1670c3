"""How long a newcomer waits: from a clean clone to a training step of examples/train_lm.py."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import record


def run() -> None:
    """README's first command on a clean clone, one step: results/first_step.json.

    pip takes packages from its cache where it has them; the CPU extension is compiled.
    """
    environment = os.environ | {"JAX_FLASHATTN_CUDA": "off"}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = pathlib.Path(folder) / "clone"
        python = ".venv/bin/python"
        commands = {
            "clone": ["git", "clone", "-q", str(record.ROOT), str(clone)],
            "venv": [sys.executable, "-m", "venv", str(clone / ".venv")],
            "install": [python, "-m", "pip", "install", "-q", "-e", ".[examples]"],
            "one step": [python, "examples/train_lm.py", "--steps", "1", "--out", folder],
        }
        for name, command in commands.items():
            begin = time.perf_counter()
            where = clone if clone.exists() else folder
            subprocess.run(command, cwd=where, env=environment, check=True)
            seconds[name] = round(time.perf_counter() - begin, 1)
            print(f"{name}: {seconds[name]} s", flush=True)
    total = round(sum(seconds.values()), 1)
    print(f"total: {total} s")
    print("written", record.write("first_step", [{"seconds": seconds, "total": total}]))
