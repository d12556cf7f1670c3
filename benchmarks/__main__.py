"""Command line of the benchmarks: each command prints a table and writes results/<name>.json."""

import argparse
import importlib


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, purpose: str, module: str, function: str, **options: dict) -> None:
        """A command that calls benchmarks.<module>.<function> with its options."""
        command = commands.add_parser(name, help=purpose)
        for option, settings in options.items():
            command.add_argument(f"--{option}", **settings)
        command.set_defaults(module=module, function=function, options=tuple(options))

    def seconds(default: float, purpose: str) -> dict:
        return {"type": float, "default": default, "help": purpose}

    add(
        "cpu",
        "speed against torch and jax.nn (needs torch)",
        *("cpu", "speed"),
        seconds=seconds(0.5, "per cell, shared by the peers"),
    )
    add(
        "cpu-features",
        "what options and packs cost on the CPU",
        *("cpu_features", "features"),
        seconds=seconds(3.0, "per cell"),
        only={"default": "", "help": "part of the names to run; writes no results"},
    )
    add(
        "dispatch",
        "time per call at S = 16 against jax.nn",
        *("cpu", "dispatch"),
        seconds=seconds(3.0, "per row"),
    )
    add("memory", "peak memory at S = 65,536", "cpu", "memory")
    add(
        "decode",
        "one token over a cache, and appends to it",
        *("decode", "run"),
        seconds=seconds(3.0, "per row"),
    )
    add(
        "first-step",
        "seconds from a clean clone to a training step, and of the tests; size of the wheel",
        *("first_step", "run"),
    )
    turns = {"rounds": {"type": int, "default": 3}, "iterations": {"type": int, "default": 8}}
    add("gpu", "kernel time of both passes against cuDNN (needs a GPU)", "gpu", "dense", **turns)
    add(
        "gpu-features",
        "what options, packs, windows and groups of heads cost (needs a GPU)",
        *("gpu", "features"),
        **turns,
    )
    add(
        "gpu-peers",
        "both passes against every peer that can be imported (needs a GPU)",
        *("gpu_peers", "run"),
        **turns,
    )
    add(
        "gpu-compare",
        "builds of the CUDA extension in turns; writes no results (needs a GPU)",
        *("gpu_compare", "run"),
        builds={"required": True, "help": "paths of _cuda*.so, with commas; the first is the base"},
        cells={"default": "", "help": "such as backward/128/4096/causal+softcap,forward/packed"},
        **turns,
    )
    add("plot", "draw docs/images/h200_d*.png from the results (needs matplotlib)", "plot", "gpu")
    add("table", "write README's tables from the results", "table", "write")

    chosen = parser.parse_args()
    function = getattr(importlib.import_module(f"benchmarks.{chosen.module}"), chosen.function)
    function(*(getattr(chosen, option) for option in chosen.options))


if __name__ == "__main__":
    main()
