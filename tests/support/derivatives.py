"""Gradients as one program: op by op, each operation of each shape would be compiled alone."""

import jax


def vjp(function, arrays: tuple, cotangents) -> tuple:
    """Results of function(*arrays), then its gradients, as numpy arrays.

    cotangents: of the results, or a function of the results that makes them.
    """

    @jax.jit
    def run(arrays, given):
        results, pull = jax.vjp(function, *arrays)
        return results, pull(cotangents(results) if given is None else given)

    results, gradients = jax.device_get(run(arrays, None if callable(cotangents) else cotangents))
    return *(results if isinstance(results, tuple) else (results,)), *gradients
