"""MagicLens's released parameters <-> ours: the whole CLIP, as scenic names it, and the fusion.

Their attention keeps heads apart, [dim, heads, head_dim]; ours are matrices. A table says where the
heads stand in each tensor, so that a file with other heads of the same size is told apart.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.models.clip import ClipConfig
from cir_jax.models.transformer import TowerConfig
from cir_jax.weights import convert

ROOT = "params/"
"""Of all names in a released file."""

PARTS = ("query", "key", "value")


@dataclasses.dataclass
class Table:
    """names: source name -> our path; heads: source name -> (axis of the heads, their number)."""

    names: convert.Names = dataclasses.field(default_factory=convert.Names)
    heads: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def same(self, source: str, *path: str) -> None:
        self.names[source] = (path, "same")

    def both(self, source: str, *path: str, of: tuple[str, str] = ("scale", "bias")) -> None:
        """Two tensors of one name on either side: a norm's, or ("kernel", "bias")."""
        for name in of:
            self.same(f"{source}/{name}", *path, name)

    def under(self, part: str) -> "Table":
        """The same, our paths below `part`."""
        names = {name: ((part, *path), layout) for name, (path, layout) in self.names.items()}
        return Table(convert.Names(names), dict(self.heads))

    def __or__(self, other: "Table") -> "Table":
        return Table(convert.Names(self.names | other.names), self.heads | other.heads)


def fusion_table(layers: int, heads: int) -> Table:
    """Of the fusion encoder and the pooler: `composers.magiclens.Fusion`."""
    table = Table()

    def attention(source: str, *path: str) -> None:
        for part in PARTS:
            table.same(f"{source}/{part}/w", *path, part, "kernel")
            table.same(f"{source}/{part}/b", *path, part, "bias")
            table.heads |= {f"{source}/{part}/w": (1, heads), f"{source}/{part}/b": (0, heads)}
        # [dim, heads, head_dim], too, though it goes the other way
        table.names[f"{source}/post/w"] = ((*path, "out", "kernel"), "linear")
        table.heads[f"{source}/post/w"] = (1, heads)
        table.same(f"{source}/post/b", *path, "out", "bias")

    for index in range(layers):
        source, ours = f"multimodal_encoder/x_layers_{index}", f"layers_{index}"
        table.both(f"{source}/layer_norm", ours, "norm1")
        attention(f"{source}/self_attention", ours, "attention")
        table.both(f"{source}/ff_layer/layer_norm", ours, "norm2")
        for old, new in (("ffn_layer1", "fc1"), ("ffn_layer2", "fc2")):
            table.same(f"{source}/ff_layer/{old}/linear/w", ours, new, "kernel")
            table.same(f"{source}/ff_layer/{old}/bias/b", ours, new, "bias")
    pooler = "contrastive_multimodal_pooler"
    table.same(f"{pooler}/pooling_attn_query", "pooling_query")
    attention(f"{pooler}/pool_attn", "pooling")
    table.same(f"{pooler}/pool_attn/per_dim_scale/per_dim_scale", "pooling", "per_dim_scale")
    table.both(f"{pooler}/pool_attn_ln", "pooling_norm")
    return table


def clip_table(config: ClipConfig) -> Table:
    """Of the CLIP inside, under "clip/"; a ViT's."""
    table = Table()

    def blocks(source: str, tower: str, size: TowerConfig) -> None:
        heads = size.num_attention_heads
        for index in range(size.num_hidden_layers):
            old, new = f"{source}/transformer/resblocks_{index}", (tower, f"layers_{index}")
            for part in PARTS:
                name = f"{old}/attn/{part}"
                table.both(name, *new, "attention", part, of=("kernel", "bias"))
                table.heads |= {f"{name}/kernel": (1, heads), f"{name}/bias": (0, heads)}
            table.both(f"{old}/attn/out", *new, "attention", "out", of=("kernel", "bias"))
            table.heads[f"{old}/attn/out/kernel"] = (0, heads)
            for theirs, ours in (("c_fc", "fc1"), ("c_proj", "fc2")):
                table.both(f"{old}/mlp/{theirs}", *new, ours, of=("kernel", "bias"))
            for part in ("1", "2"):
                table.both(f"{old}/ln_{part}", *new, f"norm{part}")

    image, text = "clip/visual", "clip/text"
    table.same("clip/logit_scale", "logit_scale")
    table.same(f"{image}/conv1/kernel", "vision", "patch_embedding", "kernel")
    table.same(f"{image}/class_embedding", "vision", "class_embedding")
    table.same(f"{image}/positional_embedding", "vision", "position_embedding")
    table.both(f"{image}/ln_pre", "vision", "pre_norm")
    blocks(image, "vision", config.vision)
    table.both(f"{image}/ln_post", "vision", "post_norm")
    table.same(f"{image}/proj/kernel", "visual_projection", "kernel")
    table.same(f"{text}/token_embedding/embedding", "text", "token_embedding", "embedding")
    table.same(f"{text}/positional_embedding", "text", "position_embedding")
    blocks(text, "text", config.text)
    table.both(f"{text}/ln_final", "text", "final_norm")
    table.same(f"{text}/text_projection/kernel", "text_projection", "kernel")
    return table


def to_params(
    tensors: Mapping[str, np.ndarray], table: Table, what: str = "MagicLens weights"
) -> dict[str, Any]:
    """Our tree (float32) of the tensors that the table names, which must be all there are.

    Raises WeightsError for missing or unknown tensors, for other numbers of heads, and as
    `convert.to_ours`.
    """

    def joined(name: str, array: np.ndarray) -> np.ndarray:
        axis, heads = table.heads.get(name, (0, 0))
        if not heads:
            return array
        if array.ndim < axis + 2 or array.shape[axis] != heads:
            raise WeightsError(
                f"{what}: {name} has shape {array.shape}, expected {heads} heads (axis {axis}). "
                "Set composer.heads and the backbone as they are in the file: base is ViT-B/16 "
                "with 8 heads, large is ViT-L/14 with 16."
            )
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

    tensors = {name: joined(name, array) for name, array in tensors.items()}
    return convert.to_ours(tensors, table.names, what=what, dtype=np.float32)


def to_tensors(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """The inverse."""

    def apart(name: str, array: np.ndarray) -> np.ndarray:
        axis, heads = table.heads.get(name, (0, 0))
        if not heads:
            return array
        return array.reshape(*array.shape[:axis], heads, -1, *array.shape[axis + 1 :])

    tensors = convert.to_source(params, table.names)
    return {name: apart(name, array) for name, array in tensors.items()}
