"""How XLA compiles the tests' programs: that is most of the suite's time."""

import os

import jax


def compile_quickly() -> None:
    """Without most optimisations, by XLA's older emitters. Before jax has computed anything."""
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # later ones lack them, and an unknown flag is fatal
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {given}"
