"""Command line of the benchmarks: each command prints a table and writes results/<name>.json."""

import argparse


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("cpu", help="speed against torch and jax.nn (needs torch)")
    speed.add_argument("--seconds", type=float, default=0.5, help="per cell, shared by the peers")
    overhead = commands.add_parser("dispatch", help="time per call at S = 16 against jax.nn")
    overhead.add_argument("--seconds", type=float, default=3.0)
    features = commands.add_parser("cpu-features", help="what options and packs cost on the CPU")
    features.add_argument("--seconds", type=float, default=3.0, help="per cell")
    features.add_argument("--only", default="", help="part of the names to run; writes no results")
    commands.add_parser("memory", help="peak memory at S = 65,536")
    decode = commands.add_parser("decode", help="one token over a cache, and appends to it")
    decode.add_argument("--seconds", type=float, default=3.0, help="per row")
    for name, purpose in (
        ("gpu", "kernel time of both passes against cuDNN"),
        ("gpu-features", "what options, packs, windows and groups of heads cost"),
    ):
        gpu = commands.add_parser(name, help=f"{purpose} (needs a GPU)")
        gpu.add_argument("--rounds", type=int, default=3)
        gpu.add_argument("--iterations", type=int, default=8)
    commands.add_parser("table", help="write README's tables from the results")
    arguments = parser.parse_args()

    if arguments.command == "table":
        from benchmarks import table

        table.write()
        return
    if arguments.command.startswith("gpu"):
        from benchmarks import gpu

        run = gpu.dense if arguments.command == "gpu" else gpu.features
        run(arguments.rounds, arguments.iterations)
        return
    if arguments.command == "decode":
        from benchmarks import decode as benchmark

        benchmark.run(arguments.seconds)
        return
    if arguments.command == "cpu-features":
        from benchmarks import cpu_features

        cpu_features.features(arguments.seconds, arguments.only)
        return
    from benchmarks import cpu

    if arguments.command == "cpu":
        cpu.speed(arguments.seconds)
    elif arguments.command == "dispatch":
        cpu.dispatch(arguments.seconds)
    else:
        cpu.memory()


if __name__ == "__main__":
    main()
