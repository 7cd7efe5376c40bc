"""T5 encoders in Hugging Face format: names of their tensors."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.weights import convert, lazy

IGNORE = (
    r"decoder\..*",  # of the whole T5 the encoder is enough
    r"lm_head\.weight",
)
FIELDS = frozenset(
    {"feed_forward_proj", "n_positions", *(field.name for field in dataclasses.fields(T5Config))}
)
"""Of a config.json; the encoder has no positions of its own."""

CONTEXT_LENGTH = 512
"""Tokens of T5's own training texts (`n_positions` of its config)."""

TOKENIZER = (
    "It is tokenizer.json or spiece.model, the same for T5 v1.0, v1.1 and Flan-T5: "
    "`hf download google/flan-t5-small spiece.model --local-dir {}`."
)

SHARED, EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
"""Two names of one tensor; files hold the first, the second or both."""


def names(config: T5Config) -> dict[str, convert.Target]:
    """Name table of transformers' T5EncoderModel."""
    table: dict[str, convert.Target] = {
        SHARED: (("token_embedding", "embedding"), "same"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            ("relative_bias",),
            "same",
        ),
        "encoder.final_layer_norm.weight": (("final_norm", "scale"), "same"),
    }
    attention = {"q": "query", "k": "key", "v": "value", "o": "out"}
    gated = {"wi_0": "gate", "wi_1": "fc1", "wo": "fc2"}
    mlp = gated if config.is_gated_act else {"wi": "fc1", "wo": "fc2"}
    for i in range(config.num_layers):
        old, new = f"encoder.block.{i}.layer", f"layers_{i}"
        for theirs, ours in attention.items():
            path = (new, "attention", ours, "kernel")
            table[f"{old}.0.SelfAttention.{theirs}.weight"] = (path, "linear")
        for theirs, ours in mlp.items():
            path = (new, ours, "kernel")
            table[f"{old}.1.DenseReluDense.{theirs}.weight"] = (path, "linear")
        for j in range(2):
            table[f"{old}.{j}.layer_norm.weight"] = ((new, f"norm{j + 1}", "scale"), "same")
    return table


def shapes(model: T5Encoder) -> dict[str, Any]:
    """The model's parameters as shapes; nothing is computed."""
    token_ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), token_ids)["params"]


def to_params(
    tensors: Mapping[str, np.ndarray],
    config: T5Config,
    what: str = "T5 weights",
    dtype: Any = None,
) -> dict[str, Any]:
    """As `unread`, and read. Raises WeightsError for numbers that are none, too."""
    return convert.read(unread(tensors, config, what, dtype))


def unread(
    tensors: Mapping[str, np.ndarray],
    config: T5Config,
    what: str,
    dtype: Any,
) -> dict[str, Any]:
    """Parameters of `T5Encoder(config)`, not read yet. Raises WeightsError for what
    does not fit.

    dtype: of the parameters; None = as they are stored.
    """
    table, ignore = names(config), IGNORE
    if SHARED not in tensors:
        table[EMBEDDING] = table.pop(SHARED)
    elif EMBEDDING in tensors:
        if not lazy.equal(lazy.stored(tensors, EMBEDDING), lazy.stored(tensors, SHARED)):
            raise WeightsError(
                f"{what}: {SHARED} and {EMBEDDING} differ; T5 ties them. Save the model again."
            )
        ignore = (*IGNORE, re.escape(EMBEDDING))
    params = convert.unread(tensors, table, ignore=ignore, what=what, dtype=dtype)
    convert.check_shapes(params, shapes(T5Encoder(config)), what)
    return params


def to_tensors(params: Mapping[str, Any], config: T5Config) -> dict[str, np.ndarray]:
    """A state dict for transformers' T5EncoderModel."""
    return convert.to_source(jax.device_get(params), names(config))
