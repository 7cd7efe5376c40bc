"""Operations of a traced program's products of matrices and convolutions, loops counted."""

import math
from typing import Any

from jax.extend import core


def of_products(jaxpr: Any) -> int:
    """Multiplications and additions of a (closed) jaxpr, over all devices.

    XLA's own count of a compiled program counts a loop once. Of a branch the dearest counts; a loop
    whose end is found while it runs counts once.
    """
    return sum(_of(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        result = equation.outvars[0].aval.shape
        return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        # what each output sums: all of the kernel but its output features
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        dilated = math.prod(params["lhs_dilation"])  # of those, only these are no zeros
        return 2 * math.prod(result) * math.prod(kernel) // features // dilated
    inner = [of_products(each) for each in core.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)
