"""Options, devices, and the rule that a missing GPU is a skip only when nobody asked for one."""

import os

# The oracle's products are small; threads would only get in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Several test processes share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from support import xla
from support.case import parse

# Eight CPU devices, so that sharding runs in the same process as everything else.
jax.config.update("jax_num_cpu_devices", 8)
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs it all as users do; tests in processes of their own always.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    xla.compile_quickly()


def pytest_addoption(parser):
    group = parser.getgroup("jax_flashattn")
    group.addoption("--repro", help="run only this case: the repr a failure shows")
    group.addoption("--fuzz", type=int, default=200, help="how many random cases to run")
    group.addoption("--fuzz-seed", type=int, default=0, help="geometry seed of the first program")
    group.addoption(
        "--require-gpu", action="store_true", help="a missing GPU or CUDA extension is a failure"
    )
    group.addoption(
        "--backend", choices=("cpu", "cuda"), help="platform of --repro and of tests/gpu"
    )


def pytest_generate_tests(metafunc):
    if metafunc.function.__name__ == "test_repro":
        text = metafunc.config.getoption("repro")
        metafunc.parametrize("case", [parse(text)] if text else [], ids=repr)


def pytest_collection_modifyitems(config, items):
    if config.getoption("repro") is None:
        others = [item for item in items if item.originalname == "test_repro"]
    else:
        others = [item for item in items if item.originalname != "test_repro"]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(autouse=True)
def _on_cpu():
    """Tests run on the CPU, whatever else the machine has; tests/gpu choose their own device."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield
