"""Runs one case through the public call and holds it against the oracle; serves every platform."""

import contextlib
import functools

import jax
import numpy as np
from support import compare, hlo, oracle
from support.case import Case
from support.data import Problem, make_problem

from jax_flashattn import IntervalMask, flash_attention

GRADIENTS = ("dq", "dk", "dv")
LEARNED = ("bias", "sinks")  # further arguments with gradients, "dbias" and "dsinks"


def x64_if(wanted: bool):
    """A context in which float64 arrays exist, if wanted."""
    return jax.enable_x64(True) if wanted else contextlib.nullcontext()


def call(query, key, value, arguments: dict, **options):
    """flash_attention with masks as Problem.mask_arguments writes them."""
    arguments = dict(arguments)
    if "intervals" in arguments:
        arguments["mask"] = IntervalMask(*arguments.pop("intervals"))
    return flash_attention(query, key, value, **arguments, **options)


@functools.cache
def jitted(options: tuple):
    """out, lse, dq, dk, dv, then dbias and dsinks where given, as one program.

    Shared by cases with the same static options.
    """
    keywords = dict(options)

    def run(query, key, value, dout, dlse, arguments):
        fixed = {n: x for n, x in arguments.items() if n not in LEARNED}
        learned = {n: arguments[n] for n in LEARNED if n in arguments}

        def forward(query, key, value, learned):
            return call(query, key, value, fixed | learned, return_lse=True, **keywords)

        (out, lse), pullback = jax.vjp(forward, query, key, value, learned)
        *gradients, of_learned = pullback((dout, dlse))
        return out, lse, *gradients, *of_learned.values()

    return jax.jit(run)


@functools.cache
def _compiled(options: tuple, shapes: tuple, structure, platform: str):
    arrays = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*s) for s in shapes])
    compiled = jitted(options).lower(*arrays).compile()
    if all(arrays[0].shape):  # else XLA drops a call without results
        hlo.assert_kernels(compiled.as_text(), forward=1, backward=1)
    return compiled


def forget_programs() -> None:
    """Frees what was compiled: a long run of other programs follows."""
    _compiled.cache_clear()
    jitted.cache_clear()


def execute(problem: Problem, arrays: dict, platform: str = "cpu") -> dict:
    """Value and gradients of the library, as numpy arrays; asserts that our kernels ran."""
    names = ("query", "key", "value", "dout", "dlse")
    with (
        x64_if(problem.case.dtype == "float64"),
        jax.default_device(jax.devices(platform)[0]),
    ):
        given = (*(arrays[n] for n in names), problem.mask_arguments())
        leaves, structure = jax.tree.flatten(given)
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        options = tuple(problem.case.options().items())
        run = _compiled(options, shapes, structure, platform)
        results = jax.device_get(run(*given))
    learned = ["d" + n for n in LEARNED if n in given[-1]]
    return dict(zip(("out", "lse", *GRADIENTS, *learned), results, strict=True))


def check_results(problem: Problem, results: dict) -> None:
    """The policy: structure, exact zeros, then numbers."""
    case, see, given = problem.case, problem.see, problem.features
    args = (problem.clean, see, problem.scale, given)
    with np.errstate(all="ignore"):
        exact, low = oracle.attention(*args), oracle.attention(*args, low=True)
        floors = oracle.rounding_floors(*args)
    statistics = "float64" if case.dtype == "float64" else "float32"
    dtypes = dict.fromkeys(exact, case.dtype) | {"lse": statistics, "dsinks": statistics}
    dtypes["dbias"] = case.bias_dtype or case.dtype
    for name, wanted in exact.items():
        compare.assert_structure(name, results[name], wanted, dtypes[name], case)
    seen = {"q": see.any(2), "k": see.any(1)}
    for name, side in (("out", "q"), ("dq", "q"), ("dk", "k"), ("dv", "k")):
        unused = np.broadcast_to(~seen[side][..., None, None], exact[name].shape)
        compare.assert_zero(name, results[name], unused, case)
    if given.bias is not None:
        read = oracle.reduced_to(see[:, None], given.bias.shape, np.any)
        unused = np.broadcast_to(~read, given.bias.shape)
        compare.assert_zero("dbias", results["dbias"], unused, case)
    compare.assert_lse(results["lse"], exact["lse"], case.dtype, floors["lse"], case)
    for name in [n for n in exact if n != "lse"]:
        factor = 2 if name == "out" else 3
        args = (exact[name], low[name], dtypes[name], factor, floors[name])
        compare.assert_numbers(name, results[name], *args, case)


def check_case(case: Case, platform: str = "cpu") -> dict:
    """One case, forward and backward, against the oracle; returns the results."""
    problem = make_problem(case)
    results = execute(problem, problem.given, platform)
    check_results(problem, results)
    return results
