"""Builds of the CUDA extension in turns in one process: what a change is worth."""

import importlib.machinery
import importlib.util
import pathlib
import statistics
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np

from benchmarks import gpu
from jax_flashattn import _lowering, _native

CELLS = (
    "forward/128/4096/full,forward/128/4096/causal,forward/128/1024/causal,forward/packed,"
    "backward/128/4096/full,backward/128/4096/causal,backward/128/1024/causal,backward/packed"
)


def _load(path: pathlib.Path, number: int) -> ModuleType:
    """The extension at `path`, beside others of its name."""
    name = f"build{number}._cuda"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _register(path: pathlib.Path, number: int) -> str:
    """Makes a build's kernels custom calls of their own, whose names end as returned."""
    module, ending = _load(path, number), f"_build{number}"
    for target, handler in (
        (_native.FORWARD, module.forward()),
        (_native.BACKWARD, module.backward()),
    ):
        jax.ffi.register_ffi_target(target + ending, handler, platform="CUDA")
    return ending


def _cell(name: str) -> tuple[str, list[jax.Array], dict]:
    """Pass, arrays and options of pass/head dim/length/mask+option..., pass/packed, pass/window."""
    mode, *rest = name.split("/")
    if rest == ["packed"]:
        lengths = gpu.documents()
        arrays = gpu.make_arrays(1, sum(lengths), 16, 16, 128)
        return mode, arrays, {"causal": True, "segment_ids": gpu.segment_ids(lengths)}
    if rest == ["window"]:
        return mode, gpu.make_arrays(1, 16384, 16, 16, 128), {"causal": True, "window": (1023, 0)}
    if mode not in ("forward", "backward") or len(rest) != 3:
        raise ValueError(f"a cell is like backward/128/4096/causal+softcap, got {name!r}.")
    d, s = int(rest[0]), int(rest[1])
    mask, *given = rest[2].split("+")
    h = gpu.WIDTH // d
    known = gpu.options(h)
    if mask not in ("full", "causal") or not set(given) <= set(known):
        raise ValueError(f"{rest[2]!r} is not full or causal with any of {sorted(known)}.")
    options = {"causal": mask == "causal"}
    for option in given:
        options |= known[option]
    return mode, gpu.make_arrays(gpu.TOKENS // s, s, h, h, d), options


def _programs(endings: list[str], attention: Callable, mode: str, arrays) -> list[Callable]:
    """The compiled call of each build."""
    plain, programs = _lowering._call, []
    for ending in endings:
        _lowering._call = lambda target, *x, ending=ending, **y: plain(target + ending, *x, **y)
        function = gpu.gradient(attention) if mode == "backward" else attention
        fresh = jax.jit(lambda *x, f=function: f(*x))  # jit would find the last build's again
        programs.append(fresh.lower(*arrays).compile())
        assert ending in programs[-1].as_text(), "the call is not that build's"
    _lowering._call = plain
    return programs


def run(builds: str, cells: str, rounds: int, iterations: int) -> None:
    """Milliseconds of the first build, how much faster the others are, how far their results."""
    paths = [pathlib.Path(x) for x in builds.split(",")]
    endings = [_register(path, i) for i, path in enumerate(paths)]
    for name in (cells or CELLS).split(","):
        mode, arrays, options = _cell(name)
        arrays = arrays if mode == "backward" else arrays[:3]
        programs = _programs(endings, gpu.ours(**options), mode, arrays)
        results = [
            [np.asarray(x, np.float32) for x in jax.tree.leaves(p(*arrays))] for p in programs
        ]
        away = [
            max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(other, results[0]))
            for other in results
        ]
        samples: list[list[float]] = [[] for _ in programs]
        for _ in range(rounds):
            for program, ms in zip(programs, samples):
                ms.append(gpu.milliseconds(program, arrays, iterations, mode == "backward"))
        medians = [statistics.median(ms) for ms in samples]
        print(f"{name}: {paths[0].name} {medians[0]:.4f} ms", end="")
        for path, ms, far in zip(paths[1:], medians[1:], away[1:]):
            print(f", {path.name} {100 * (medians[0] / ms - 1):+.1f} % ({far:.0e} away)", end="")
        print(flush=True)
