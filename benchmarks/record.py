"""Where numbers come from and where they go: environment, medians, results/*.json."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable

import jax

from jax_flashattn import _native

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax_flashattn", "jax", "jaxlib", "torch", "tokamax", "numpy")


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _gpu_state() -> list[dict]:
    """Clocks and power of each GPU, as they are right after the run; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,enforced.power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []  # no driver: no GPU
    return [dict(zip(query.split(","), line.split(", "))) for line in lines]


def source_hash() -> str:
    """Of everything under csrc/: which kernels a number belongs to."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict:
    """Versions, machine and source hash of this run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_model(),
        "devices": [d.device_kind for d in jax.devices()],
        "gpus": _gpu_state(),
        "cores": len(os.sched_getaffinity(0)),
        "csrc": source_hash(),
    }


def write_cpu(name: str, rows: list[dict]) -> pathlib.Path:
    """As write, but results/<name>_amx.json where bfloat16 runs on AMX."""
    has_amx = _native.modules["cpu"].instruction_set() == "amx"
    return write(f"{name}_amx" if has_amx else name, rows)


def write(name: str, rows: list[dict]) -> pathlib.Path:
    """Stores rows with their environment as results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def interleaved_medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, taking turns so that all see the same machine.

    A turn is a pause, in which the other peer's spinning worker threads leave the cores; calls for
    a tenth of a second, in which one's own are spread over the cores again; and timed calls, three
    or as many as fit 20 ms, but one if it is long. Three turns each, and on for `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 3 or time.perf_counter() < end:
        turn += 1
        for name, call in calls.items():
            time.sleep(0.05)
            warm = time.perf_counter() + 0.1
            while time.perf_counter() < warm:
                call()
            spent: list[float] = []
            while not spent or (sum(spent) < 0.1 and (len(spent) < 3 or sum(spent) < 0.02)):
                begin = time.perf_counter()
                call()
                spent.append(time.perf_counter() - begin)
            times[name] += spent
    return {name: statistics.median(values) for name, values in times.items()}
