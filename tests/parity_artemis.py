"""Parity handlers of ARTEMIS: both encoders from maps or stored features, all of its scores."""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.composers import artemis, image_only, image_text, text_only
from cir_jax.composers.losses import pair_cross_entropy
from cir_jax.models.artemis import RECURRENT, Artemis, ArtemisConfig, ResNetConfig, WordConfig
from cir_jax.weights import artemis as weights
from cir_jax.weights import convert

Outputs = dict[str, Any]

BASELINES = {
    "arithmetic": image_text.ImageText,
    "crossmodal": text_only.TextOnly,
    "visualsearch": image_only.ImageOnly,
}


def whole(fixture: Any) -> Outputs:
    """The trunk of the image branch is left out of the fixtures: its maps come in."""
    config, inputs = fixture.config, fixture.inputs
    lstm = config["txt_enc_type"] == "lstm"
    state = fixture.params[f"txt_enc.sent_enc.{'0.' if lstm else ''}weight_ih_l0"].shape[0]
    state //= RECURRENT[config["txt_enc_type"]]
    pool = "mean" if config["load_image_feature"] else "gem"
    sizes = ArtemisConfig(
        WordConfig(config["vocab"], config["word_dim"], config["txt_enc_type"], state),
        ResNetConfig(pool=pool),
        config["embed_dim"],
    )
    table = weights.names(sizes)
    encoders = {name: x for name, x in fixture.params.items() if name.startswith(("img_", "txt_"))}
    present = {name: t for name, t in table.items() if not name.startswith(weights.CNN)}
    params = {"params": convert.to_ours(encoders, present, what=fixture.path.name)}
    networks = {name: x for name, x in fixture.params.items() if name not in encoders}
    networks = convert.to_ours(networks, artemis.NAMES, what=fixture.path.name)
    run = jax.jit(functools.partial(outputs, Artemis(sizes), config, lstm))
    return run(params, networks, inputs)


def outputs(
    model: Artemis, config: Mapping[str, Any], lstm: bool, params: Any, networks: Any, inputs: Any
) -> Outputs:
    """Embeddings, attention, all scores and both losses."""

    def images(x: jax.Array) -> jax.Array:
        if x.ndim == 2:  # stored features, whose embeddings have no unit norm in the original
            return model.apply(params, x[:, None, None], method="pool")
        return artemis.normalise(model.apply(params, x.transpose(0, 2, 3, 1), method="pool"))

    ids = inputs["sentences"]
    # the released LSTM goes on to the end of the longest text of the batch
    read = jnp.arange(ids.shape[1]) < (ids.shape[1] if lstm else inputs["lengths"][:, None])
    read = jnp.broadcast_to(read, ids.shape)
    m = model.apply(params, ids, method=lambda self, ids: self.text(self.embed_tokens(ids), read))
    r, t = images(inputs["images_src"]), images(inputs["images_trg"])

    stub = types.SimpleNamespace(
        dim=config["embed_dim"], family="artemis", encode_text=lambda params, ids: m
    )
    query = {"reference_features": r, "token_ids": ids}
    frozen, key = {"backbone": {}}, jax.random.key(0)

    scores = {}
    for version, name in (("ARTEMIS", "artemis"), ("EM-only", "EM"), ("IS-only", "IS")):
        composer = artemis.Artemis(stub, embed_dim=0, version=version)
        features = composer.compose(networks, frozen, query, key)
        gallery = composer.embed_features(networks, frozen, t)
        scores[name] = composer.score(networks, features, gallery)
    for name, baseline in BASELINES.items():
        composer = baseline(stub)
        scale = jnp.linalg.norm(r, axis=-1, keepdims=True) if name == "visualsearch" else 1.0
        scores[name] = scale * composer.compose({}, frozen, query, key) @ t.T
    if config["load_image_feature"]:
        unit = m / jnp.linalg.norm(m, axis=-1, keepdims=True)
        mixed = r + unit
        scores["arithmetic"] = mixed / jnp.linalg.norm(mixed, axis=-1, keepdims=True) @ t.T
    whole = artemis.Artemis(stub, embed_dim=0)
    one = {name: x[:1] for name, x in query.items()}
    stub.encode_text = lambda params, ids: m[:1]
    alone = whole.compose(networks, frozen, one, key)
    stub.encode_text = lambda params, ids: m
    rows = whole.encode(networks, frozen, query | {"target_features": t}, key)
    network, text = whole.network, artemis.normalise(m)

    def run(method: Callable[..., jax.Array]) -> jax.Array:
        return network.apply({"params": networks}, text, method=method)

    return {
        "r": r,
        "t": t,
        "m": text,
        "Transform_m": artemis.normalise(run(lambda self, x: self.transform(x))),
        "attention_EM": run(lambda self, x: self.explicit(x)),
        "attention_IS": run(lambda self, x: self.implicit(x)),
        **{f"score_{name}": jnp.diag(x) for name, x in scores.items()},
        **{f"score_broadcast_{name}": x for name, x in scores.items()},
        "scores_one_query": whole.score(networks, alone, rows["target"])[0],
        "loss_plain": pair_cross_entropy(scores["artemis"]),
        "loss_temperature": whole.objective(networks, rows)[0],
    }


HANDLERS: dict[str, Callable[[Any], Outputs]] = {"artemis": whole}
