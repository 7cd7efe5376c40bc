"""Learning-rate schedules and optimisers, from config fields to optax."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict

from cir_jax.errors import ConfigError, unknown
from cir_jax.models.resnet import STATISTICS

SCHEDULES = ("constant", "cosine", "linear", "step")


def schedule(config: Mapping[str, Any], steps: int, to_steps: Callable[..., int]) -> optax.Schedule:
    """Linear warm-up, then constant, or cosine or linear decay to `final` x learning_rate.

    "step": multiplied by `drop` every `drop_every`, as PyTorch's StepLR.
    config: learning_rate, schedule, warmup, drop_every (durations), final, drop (0..1).
    """
    peak, kind = config["learning_rate"], config["schedule"]
    warmup = to_steps(config["warmup"], field="optimizer.warmup", total_steps=steps)
    if kind not in SCHEDULES:
        raise ConfigError(unknown("schedule", kind, SCHEDULES))
    decay_steps = max(1, steps - warmup)
    if kind == "cosine":
        main = optax.cosine_decay_schedule(peak, decay_steps, alpha=config["final"])
    elif kind == "linear":
        main = optax.linear_schedule(peak, peak * config["final"], decay_steps)
    elif kind == "step":
        every = to_steps(config["drop_every"], field="optimizer.drop_every", total_steps=steps)
        if every < 1:
            raise ConfigError("optimizer.drop_every: schedule 'step' needs 1 step or more.")
        main = optax.exponential_decay(peak, every, config["drop"], staircase=True)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup])


def path_mask(pattern: str) -> Callable[[Any], Any]:
    """tree -> tree of bools: does the parameter's path ("/text/layers_0/fc1/kernel") match?"""
    matcher = re.compile(pattern)

    def mask(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(matcher.fullmatch("/" + "/".join(str(k.key) for k in path))), tree
        )

    return mask


def optimizer(
    config: Mapping[str, Any], steps: int, to_steps: Callable[..., int]
) -> optax.GradientTransformation:
    """The optimiser that `config` describes; see experiments/base.py for its fields and defaults.

    weight_decay acts on the parameters whose path matches `decay` (default: matrices only), but
    never on the statistics of frozen batch norms, which get no gradient either.
    only: paths of what is trained; the rest stays as it is, without moments or decay.
    backbone_share: of each update, what the parameters under "backbone" take.
    muon: orthogonalised momentum on the matrices inside the blocks, Adam (adam_learning_rate) on
    the rest.
    """
    rate = schedule(config, steps, to_steps)
    name = config["name"]
    adam = {"b1": config["b1"], "b2": config["b2"], "eps": config["eps"]}
    decay = path_mask(rf"(?!.*/({'|'.join(STATISTICS)})$)({config['decay']})")
    if name == "adamw":
        main = optax.adamw(rate, **adam, weight_decay=config["weight_decay"], mask=decay)
    elif name == "muon":
        ratio = config["adam_learning_rate"] / config["learning_rate"]
        inside = path_mask(r".*/layers_\d+/.*/kernel")
        matrix = optax.contrib.MuonDimensionNumbers()

        def dimensions(tree: Any) -> Any:
            return jax.tree.map(lambda chosen: matrix if chosen else None, inside(tree))

        main = optax.contrib.muon(
            rate,
            ns_steps=4,
            eps=config["eps"],
            adam_b1=config["b1"],
            adam_b2=config["b2"],
            adam_learning_rate=lambda step: rate(step) * ratio,
            muon_weight_dimension_numbers=dimensions,
            weight_decay=config["weight_decay"],
            weight_decay_mask=decay,
            adam_weight_decay=0.0,
        )
    else:
        raise ConfigError(unknown("optimizer", name, ("adamw", "muon")))
    parts = [main]
    share = config.get("backbone_share", 1.0)  # not in configs of earlier versions
    if share != 1:
        parts.append(optax.masked(optax.scale(share), path_mask("/backbone/.*")))
    if config["clip_norm"]:
        parts.insert(0, optax.clip_by_global_norm(config["clip_norm"]))
    main = optax.chain(*parts) if len(parts) > 1 else main
    only = config.get("only", ".*")  # likewise
    return main if only == ".*" else _partly(main, only)


def held(params: Any, only: str) -> Any:
    """The same; of those whose path does not match `only` no gradient is computed."""
    if only == ".*":
        return params
    trained = path_mask(only)(params)
    return jax.tree.map(lambda x, own: x if own else jax.lax.stop_gradient(x), params, trained)


def _partly(main: optax.GradientTransformation, only: str) -> optax.GradientTransformation:
    """`main` for the parameters whose path matches."""
    trained = path_mask(only)

    def labels(tree: Any) -> Any:
        mask = trained(tree)
        if not any(jax.tree.leaves(mask)):
            paths = ["/".join(map(str, path)) for path in flatten_dict(tree)]
            raise ConfigError(
                f"optimizer.only={only!r} matches no parameter. Paths look like: "
                f"{', '.join('/' + path for path in paths[:: max(1, len(paths) // 6)][:6])}."
            )
        return jax.tree.map(lambda train: "trained" if train else "held", mask)

    return optax.partition({"trained": main, "held": optax.set_to_zero()}, labels)
