"""Programs that are compiled to be read."""

import jax


def compiled(lowered: jax.stages.Lowered, loops_stay: bool = False) -> jax.stages.Compiled:
    """What devices exchange is the same as of a program to be run; it takes a third of the time.

    loops_stay: what a loop gathers anew in each iteration stays in it, as it does on TPUs; CPUs'
    compiler takes it out.
    """
    options = {"xla_backend_optimization_level": 0}
    if loops_stay:
        options["xla_disable_hlo_passes"] = "while-loop-invariant-code-motion"
    if jax.__version_info__ < (0, 11):  # later ones have no other way to compile
        options["xla_cpu_use_fusion_emitters"] = False
    return lowered.compile(compiler_options=options)
