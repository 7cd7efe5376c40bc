"""CompoDiff's released checkpoints <-> parameters of `composers.compodiff.Denoiser`.

The Hugging Face file prefixes every name with "model."; the training file holds the same names
without it under the key "ema_model". The schedule and the rotary frequencies are stored, but are
constants: checked on reading, made again on writing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cir_jax.diffusion.schedule import cosine
from cir_jax.errors import WeightsError
from cir_jax.models.denoiser import DenoiserConfig, rotary_frequencies
from cir_jax.weights import convert

PREFIX = "model."
CONSTANTS = (r"noise_scheduler\..*", r".*\.rotary_emb\.freqs")


def names(config: DenoiserConfig) -> convert.Names:
    """Name table of the training file."""
    table = convert.Names()

    def same(source: str, *path: str) -> None:
        table[source] = (path, "same")

    table.linear("net.to_text_embeds.0", "text_embedding")
    for source, ours in (("to_time_embeds.0.1", "time"), ("to_mask_embeds.1", "mask")):
        for index, name in (("0.0", "fc1"), ("1.0", "fc2"), ("2", "fc3")):
            table.linear(f"net.{source}.net.{index}", f"{ours}_embedding", name)
    same("net.transformer.rel_pos_bias.relative_attention_bias.weight", "relative_bias")
    for index in range(config.depth):
        source, ours = f"net.transformer.layers.{index}", f"layers_{index}"
        for block, name in ((f"{source}.0", "self_attention"), (f"{source}.1", "cross_attention")):
            same(f"{block}.norm.g", ours, name, "norm", "scale")
            same(f"{block}.null_kv", ours, name, "null_key_value")
            table.linear(f"{block}.to_q", ours, name, "query", bias=False)
            table.linear(f"{block}.to_kv", ours, name, "key_value", bias=False)
            table.linear(f"{block}.to_out.0", ours, name, "out", bias=False)
            same(f"{block}.to_out.1.g", ours, name, "out_norm", "scale")
        same(f"{source}.2.0.g", ours, "feed_forward", "norm", "scale")
        table.linear(f"{source}.2.1", ours, "feed_forward", "fc1", bias=False)
        table.linear(f"{source}.2.5", ours, "feed_forward", "fc2", bias=False)
    same("net.transformer.norm.g", "final_norm", "scale")
    table.linear("net.transformer.project_out", "out", bias=False)
    return table


def constants(config: DenoiserConfig) -> dict[str, np.ndarray]:
    """{name without prefix: tensor} of what is stored but not trained."""
    tables = dataclasses.asdict(cosine(config.timesteps))
    found = {f"noise_scheduler.{name}": table for name, table in tables.items()}
    frequencies = rotary_frequencies(config.dim_head)
    for index in range(config.depth):
        found[f"net.transformer.layers.{index}.0.rotary_emb.freqs"] = frequencies
    return found


def config_of(tensors: Mapping[str, np.ndarray]) -> DenoiserConfig:
    """The sizes, read off the shapes; names with or without prefix.

    Raises WeightsError for other models' tensors.
    """
    shape = {name.removeprefix(PREFIX): np.shape(tensor) for name, tensor in tensors.items()}
    layer = "net.transformer.layers.{}.1.to_q.weight".format
    try:
        dim_head = shape["net.transformer.layers.0.1.null_kv"][1]
        return DenoiserConfig(
            embed_dim=shape["net.to_text_embeds.0.weight"][0],
            text_dim=shape["net.to_text_embeds.0.weight"][1],
            depth=sum(layer(index) in shape for index in range(len(shape))),
            heads=shape["net.transformer.rel_pos_bias.relative_attention_bias.weight"][1],
            dim_head=dim_head,
            cross_heads=shape[layer(0)][0] // dim_head,
            mask_size=round(shape["net.to_mask_embeds.1.net.0.0.weight"][1] ** 0.5),
            timesteps=shape["noise_scheduler.betas"][0],
        )
    except KeyError as error:
        raise WeightsError(
            f"not a CompoDiff checkpoint: it has no {error.args[0]!r}. Expected the tensors of "
            "navervision/CompoDiff-Aesthetic, or those under 'ema_model' of a training file."
        ) from error


def to_params(tensors: Mapping[str, np.ndarray], what: str = "CompoDiff weights") -> dict[str, Any]:
    """The denoiser's parameters; names with or without prefix.

    Raises WeightsError for missing or unknown tensors, and for stored constants that are not ours.
    """
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    config = config_of(tensors)
    for name, expected in constants(config).items():
        # one tensor shared by all layers is stored once by some formats
        stored = tensors.get(name, expected)
        if stored.shape != expected.shape or not np.allclose(stored, expected, 1e-5, 1e-7):
            raise WeightsError(
                f"{what}: {name} differs from this model's. Only the cosine schedule and rotary "
                "base 10000 of the released CompoDiff are implemented."
            )
    return convert.to_ours(tensors, names(config), ignore=CONSTANTS, what=what)


def to_tensors(params: Mapping[str, Any], config: DenoiserConfig) -> dict[str, np.ndarray]:
    """The training file's tensors, without prefix."""
    return convert.to_source(params, names(config)) | constants(config)
