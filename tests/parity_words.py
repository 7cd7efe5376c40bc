"""Parity handlers of the trained inversion networks: phi, Im2Text, and their losses."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers import combiner, losses, magiclens, phi, pic2word
from cir_jax.composers.base import normalise
from cir_jax.composers.lincir import LinCir
from cir_jax.composers.pic2word import Pic2Word
from cir_jax.composers.rtd import Rtd
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import word_tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from cir_jax.weights import clip as clip_weights
from cir_jax.weights import convert, open_clip
from cir_jax.weights import magiclens as released

Outputs = dict[str, Any]


def part(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose name begins with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def phi_network(fixture: Any) -> Outputs:
    """SEARLE's and LinCIR's phi; LinCIR's trainer may normalise what goes in."""
    config, x = fixture.config, fixture.inputs["x"]
    params = convert.to_ours(fixture.params, phi.PHI_NAMES, what=fixture.path.name)
    network = phi.Phi(config["output_dim"], hidden_dim=config.get("hidden_dim"))

    @jax.jit
    def run(params: Any, x: jax.Array) -> jax.Array:
        x = normalise(x) if config.get("l2_normalize") else x
        return network.apply({"params": params}, x)

    return {"y": run(params, x)}


def im2text(fixture: Any) -> Outputs:
    """Pic2Word's mapping network."""
    config = fixture.config
    network = pic2word.Im2Text(
        config["output_dim"], config["middle_dim"], n_layer=config.get("n_layer", 2)
    )
    names = pic2word.names(network.n_layer)
    params = convert.to_ours(fixture.params, names, what=fixture.path.name)
    return {"y": jax.jit(network.apply)({"params": params}, fixture.inputs["x"])}


def distillation(fixture: Any) -> Outputs:
    """NT-Xent of stored and estimated words, and its gradient."""
    target, estimate = (
        jnp.asarray(fixture.inputs[name]) for name in ("target_oti_tokens", "estimated_tokens")
    )
    step = jax.jit(jax.value_and_grad(losses.nt_xent, argnums=1))
    loss, grad = step(target, estimate, fixture.config["temperature"])
    return {"loss": loss, "grad_estimated_tokens": grad}


def of_ids(config: ClipConfig) -> Backbone:
    """A backbone whose texts come as ids; its tokenizer only has to have the placeholders."""
    text = config.text
    tokenizer = word_tokenizer("a photo of that".split(), text.max_position_embeddings)
    return Backbone(Clip(config), tokenizer, ImageTransform(), weights_id="fixture")


def text_tower(fixture: Any) -> tuple[ClipConfig, convert.Names]:
    """Of a fixture with a text tower alone, named as transformers does."""
    values = fixture.config["text_config"]
    config = ClipConfig(
        text=TextConfig.from_dict(values),
        vision=VisionConfig(image_size=32, patch_size=16),
        projection_dim=values["projection_dim"],
    )
    kept = ("text_model.", "text_projection.")
    every = clip_weights.hf_names(config)
    return config, convert.Names({name: x for name, x in every.items() if name.startswith(kept)})


def lincir_loss(fixture: Any) -> Outputs:
    """The self-masking projection loss with the stored noise, and its gradients."""
    config, names = text_tower(fixture)
    backbone = convert.to_ours(part(fixture.params, "text."), names, what=fixture.path.name)
    backbone["logit_scale"] = np.zeros((), np.float32)  # a text tower alone; not used
    params = convert.to_ours(part(fixture.params, "phi."), phi.PHI_NAMES)
    inputs = {name: jnp.asarray(x) for name, x in fixture.inputs.items()}
    noise = inputs["noise_uniform"][:, None] * inputs["noise_normal"]

    class Stored(LinCir):
        """Draws nothing: the noise is given, and dropout is off."""

        def words(self, params: Any, features: jax.Array, rngs: Any = None) -> jax.Array:
            return super().words(params, features)

        def draw(self, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
            return noise[rng], rng

    composer = Stored(of_ids(config), l2_normalize=fixture.config.get("l2_normalize", False))
    composer.placeholder_id = 259
    batch = {"token_ids": inputs["original_ids"], "masked_token_ids": inputs["replaced_ids"]}
    rows = jnp.arange(len(noise))

    def loss(params: Any) -> jax.Array:
        encoded = composer.encode(params, {"backbone": backbone}, batch, rows)
        return composer.objective(params, encoded)[0]

    @jax.jit
    def run(params: Any) -> tuple[Outputs, Any]:
        value, grads = jax.value_and_grad(loss)(params)
        text = composer.backbone.encode_text(backbone, batch["token_ids"])
        network_input = composer.network_input(text + noise)
        words = composer.words(params, network_input)
        ids = batch["masked_token_ids"]
        embeddings = composer.backbone.embed_tokens(backbone, ids)
        embeddings = jnp.where((ids == 259)[..., None], words[:, None], embeddings)
        hidden = composer.backbone.model.apply(
            {"params": backbone}, embeddings, method="text_hidden_states"
        )
        return {
            "original_text_embeds": text,
            "phi_input": network_input,
            "estimated_token_embeddings": words,
            "replaced_text_embeds": composer.text_features(backbone, ids, words),
            "replaced_last_hidden_state": hidden,
            "loss": value,
        }, grads

    outputs, grads = run(params)
    grads = convert.to_source(grads, phi.PHI_NAMES)
    return outputs | {f"grad/phi.{name}": grad for name, grad in grads.items()}


def rtd_loss(fixture: Any) -> Outputs:
    """The target-anchored loss with the stored noise, its parts, and gradients of the text tower
    that is learned; here it is not what it begins as."""
    config, names = text_tower(fixture)
    anchor, learned = (
        convert.to_ours(part(fixture.params, f"{name}."), names, what=fixture.path.name)
        for name in ("anchor", "learnable")
    )
    anchor["logit_scale"] = np.zeros((), np.float32)  # a text tower alone; not used
    word = convert.to_ours(part(fixture.params, "phi."), phi.PHI_NAMES)
    inputs = {name: jnp.asarray(x) for name, x in fixture.inputs.items()}
    noise = inputs["noise_uniform"][:, None] * inputs["noise_normal"]

    class Stored(Rtd):
        """Draws nothing: the noise is given."""

        def draw(self, rng: jax.Array) -> jax.Array:
            return noise[rng]

    composer = Stored(
        of_ids(config),
        {"name": "searle"},
        noise=fixture.config["noise_scale"],
        temperature=fixture.config["tau"],
    )
    composer.word.network = phi.Phi(
        config.text.hidden_size, hidden_dim=fixture.config["phi_hidden_dim"]
    )
    composer.word.placeholder_id = 259
    composer.named_ids = fixture.inputs["special_tokens"][:1]
    batch = {f"{name}_token_ids": inputs[f"{name}_tokens"] for name in ("reference", "target")}
    batch["token_ids"] = inputs["concat_tokens"]
    rows, frozen = jnp.arange(len(noise)), {"backbone": anchor}

    @jax.jit
    def run(text: Any) -> tuple[Outputs, Any]:
        def loss(text: Any) -> tuple[jax.Array, Any]:
            params = {"word": word, "text": text}
            found = composer.encode(params, frozen, batch, rows)
            return composer.objective(params, found)[0], found

        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(text)
        sides = [
            jnp.concatenate([found[name] for name in names])
            for names in (("target", "reference"), ("composed", "named"))
        ]
        unit = normalise(jnp.concatenate(sides))
        similarity = unit @ unit.T / composer.temperature
        # by the definition, beside the loss itself
        counterpart = jnp.roll(jnp.arange(len(unit)), len(sides[0]))
        others = jnp.where(jnp.eye(len(unit), dtype=bool), -jnp.inf, similarity)
        each = jax.nn.logsumexp(others, axis=1) - similarity[jnp.arange(len(unit)), counterpart]
        relation = jnp.arange(len(unit)) // len(noise) % 2 == 0
        query = {"reference_features": found["reference"] + composer.noise * noise}
        return {
            "reference_text_embeddings": found["reference"],
            "phi_input": query["reference_features"],
            "estimated_token_embeddings": composer.word.invert(word, frozen, query, rows),
            "anchor_text_embeddings": sides[0],
            "learnable_text_embeddings": sides[1],
            "similarity_over_tau": similarity,
            "row_losses": each,
            "loss_relation_rows": each.mean(where=relation),
            "loss_hard_negative_rows": each.mean(where=~relation),
            "loss": value,
        }, grads

    outputs, grads = run(learned)
    grads = convert.to_source(grads, names)
    stored = {name.removeprefix("grad/learnable.") for name in fixture.expected}
    return outputs | {f"grad/learnable.{name}": grads[name] for name in grads if name in stored}


def pic2word_clip(fixture: Any) -> Outputs:
    """Training prompt, retrieval prompt, the contrastive loss and its gradients."""
    config, inputs = open_clip.from_openai(fixture.config["clip"]), fixture.inputs
    tensors = part(fixture.params, "clip.")
    backbone = convert.to_ours(tensors, open_clip.names(config), ignore=open_clip.IGNORE)
    network = fixture.config["img2text"]
    sizes = {"hidden_dim": network["middle_dim"], "n_layer": network.get("n_layer", 2)}
    composer = Pic2Word(of_ids(config), dropout=0.0, **sizes)
    params = convert.to_ours(part(fixture.params, "img2text."), composer.names)
    star = composer.placeholder_id = fixture.config["split_ind"]
    # the word before the end token is the prompt with the placeholder in that place
    prompt = inputs["prompt_ids"][0]
    end = int(np.argmax(prompt == fixture.config["clip"]["vocab_size"] - 1))
    prompt = np.insert(prompt, end, star)[None, :-1]
    composer.training_ids = prompt
    frozen = {"backbone": backbone}
    batch = {"reference_images": jnp.asarray(inputs["images"].transpose(0, 2, 3, 1))}
    rngs = jax.random.split(jax.random.key(0), len(inputs["images"]))

    def loss(params: Any) -> jax.Array:
        encoded = composer.encode(params, frozen, batch, rngs)
        return composer.objective(params, encoded)[0]

    @jax.jit
    def run(params: Any) -> tuple[Outputs, Any]:
        value, grads = jax.value_and_grad(loss)(params)
        image = composer.reference_features(frozen, batch)
        words = composer.words(params, image)
        ids = jnp.asarray(inputs["retrieval_ids"])
        # the original takes the place of the word from row 0 for all rows
        first = jnp.full(len(ids), int(np.argmax(inputs["retrieval_ids"][0] == star)))
        embeddings = composer.backbone.embed_tokens(backbone, ids)
        embeddings = embeddings.at[jnp.arange(len(ids)), first].set(words)
        repeated = jnp.broadcast_to(ids[:1], ids.shape)
        prompts = jnp.broadcast_to(prompt, (len(words), prompt.shape[1]))
        return {
            "image_features": image,
            "token_features": words,
            "text_features_appended": composer.text_features(backbone, prompts, words),
            "loss": value,
            "retrieval_repeat": composer.text_features(backbone, repeated, words),
            "retrieval_rows": composer.backbone.encode_text(backbone, ids, embeddings),
            "encode_text": composer.backbone.encode_text(backbone, ids),
        }, grads

    outputs, grads = run(params)
    grads = convert.to_source(grads, composer.names)
    return outputs | {f"grad/img2text.{name}": grad for name, grad in grads.items()}


def combiner_network(fixture: Any) -> Outputs:
    """Combiner: the fused feature, logits, the loss and its gradients, without dropout."""
    config = fixture.config
    network = combiner.Fusion(config["projection_dim"], config["hidden_dim"])
    params = convert.to_ours(fixture.params, combiner.NAMES, what=fixture.path.name)
    image, text, target = (
        jnp.asarray(fixture.inputs[f"{name}_features"]) for name in ("image", "text", "target")
    )
    composer = combiner.Combiner(
        types.SimpleNamespace(dim=image.shape[-1]), config["projection_dim"], config["hidden_dim"]
    )

    def loss(params: Any) -> tuple[jax.Array, Outputs]:
        fused = normalise(network.apply({"params": params}, text, image))
        rows = {"query": fused, "target": normalise(target)}
        logits = composer.scale * fused @ rows["target"].T
        outputs = {"combine_features": fused, "logits": logits}
        return composer.objective(params, rows)[0], outputs

    (value, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    grads = convert.to_source(grads, combiner.NAMES)
    return {
        **outputs,
        "loss": value,
        **{f"grad/{name}": grad for name, grad in grads.items()},
    }


def magiclens_network(fixture: Any) -> Outputs:
    """MagicLens: its fusion and pooler alone, or the whole model from images and ids."""
    whole = "clip" in fixture.config
    size = fixture.config["magiclens"] if whole else fixture.config
    table = released.fusion_table(size["num_layers"], size["num_heads"]).under("fusion")
    if whole:
        return _whole_magiclens(fixture, size, table)
    params = released.to_params(fixture.params, table, fixture.path.name)
    hidden = size["ff_hidden_size"]
    network = magiclens.Fusion(size["embed_dim"], size["num_layers"], size["num_heads"], hidden)
    image, text, gallery, empty = (
        jnp.asarray(fixture.inputs[f"{name}_embed{'' if name == 'empty_text' else 's'}"])
        for name in ("query_image", "query_text", "candidate_image", "empty_text")
    )

    @jax.jit
    def run(params: Any) -> Outputs:
        variables = {"params": params}
        fused = network.apply(variables, image, text)
        silent = jnp.broadcast_to(empty, gallery.shape)
        embedded = normalise(network.apply(variables, gallery, silent))
        return {
            "encoder_tokens": network.apply(variables, image, text, method="encode"),
            "multimodal_embed": fused,
            "multimodal_embed_norm": normalise(fused),
            "candidate_embed_norm": embedded,
            "scores": normalise(fused) @ embedded.T,
        }

    return run(params["fusion"])


def _whole_magiclens(fixture: Any, size: Mapping[str, int], table: released.Table) -> Outputs:
    sizes, inputs = fixture.config["clip"], fixture.inputs
    width, text_width = sizes["vision_features"], sizes["text_features"]
    config = ClipConfig(
        text=TextConfig(
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=sizes["text_num_layers"],
            num_attention_heads=sizes["text_num_heads"],
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=inputs["query_ids"].shape[1],
            eos_token_id=open_clip.ARGMAX,
        ),
        vision=VisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=sizes["vision_num_layers"],
            num_attention_heads=width // 64,
            image_size=fixture.config["image_size"],
            patch_size=sizes["vision_patch_size"],
        ),
        projection_dim=sizes["embed_dim"],
    )
    backbone = of_ids(config)
    backbone.tokenizer.eos_id = sizes["vocab_size"] - 1  # ids are CLIP's: 0 is no end
    composer = magiclens.MagicLens(
        backbone,
        size["num_layers"],
        size["num_heads"],
        size["ff_hidden_size"],
        train_backbone=True,
    )
    composer.empty_ids = inputs["empty_ids"]
    table |= released.clip_table(config).under("backbone")
    params = released.to_params(fixture.params, table, fixture.path.name)

    def pixels(images: np.ndarray) -> jax.Array:
        """The original's crop and resizing, in floating point; ours are PIL's, on the host."""
        side = min(images.shape[1:3])
        top, left = ((length - side) // 2 for length in images.shape[1:3])
        images = images[:, top : top + side, left : left + side]
        shape = (len(images), *2 * [config.vision.image_size], 3)
        mean, std = (np.asarray(x, np.float32) for x in backbone.image_transform.statistics)
        images = jax.image.resize(images, shape, "bilinear") - mean.reshape(1, 1, 1, 3)
        return images / std.reshape(1, 1, 1, 3)

    @jax.jit
    def run(params: Any) -> Outputs:
        query = {"reference_images": pixels(inputs["query_images"])}
        query["token_ids"] = jnp.asarray(inputs["query_ids"])
        towers = {"backbone": composer.encoders(params, {})}
        image = composer.reference_features(towers, query)
        text = composer.encode_text(params, {}, query["token_ids"])
        composed = composer.compose(params, {}, query, jax.random.key(0))
        gallery = composer.embed_gallery(params, {}, pixels(inputs["candidate_images"]))
        return {
            "preprocessed_images": query["reference_images"],
            "image_embeds": image,
            "text_embeds": text,
            "multimodal_embed": composer.network.apply({"params": params["fusion"]}, image, text),
            "multimodal_embed_norm": composed,
            "candidate_embed_norm": gallery,
            "scores": composer.score(params, composed, gallery),
        }

    return run(params)


HANDLERS: dict[str, Callable[[Any], Outputs]] = {
    "searle_phi": phi_network,
    "lincir_phi": phi_network,
    "pic2word_im2text": im2text,
    "searle_ldistil": distillation,
    "lincir_loss": lincir_loss,
    "pic2word_clip": pic2word_clip,
    "combiner": combiner_network,
    "rtd_loss": rtd_loss,
    "magiclens": magiclens_network,
}
