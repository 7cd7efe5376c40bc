"""Parity handlers of CLIP, preprocessing, tokens, metrics, and what composers share.

A handler takes a `parity.Fixture` and gives our outputs under the fixture's names. Sizes come from
the fixture's config only.
"""

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cir_jax.composers import compodiff, losses
from cir_jax.composers.slerp import slerp
from cir_jax.diffusion import sampling, schedule
from cir_jax.evaluation import protocols
from cir_jax.input import images
from cir_jax.input.text import CLIP_MERGES, Tokenizer, clip_bpe, placeholder_positions
from cir_jax.models.clip import Clip, ClipConfig, end_positions, overwrite_tokens
from cir_jax.models.resnet import ResNetConfig
from cir_jax.retrieval import ranking
from cir_jax.retrieval.features import unit
from cir_jax.weights import clip as clip_weights
from cir_jax.weights import compodiff as compodiff_weights
from cir_jax.weights import convert, open_clip
from tests import peers

Outputs = dict[str, Any]


class Skip(Exception):
    """Something that is not part of the project is not installed."""


INSTANT = "instant_clip_tokenizer"
DOLLAR = 259  # SEARLE and LinCIR mark the pseudo-word by it


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.transpose(x, (0, 2, 3, 1))


def nchw(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


def normalised(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def hugging_face_clip(fixture: Any) -> Outputs:
    """Both towers; with a padding mask and with pseudo-words where the fixture has them."""
    config = ClipConfig.from_dict(fixture.config)
    table = clip_weights.hf_names(config)
    params = convert.to_ours(fixture.params, table, ignore=clip_weights.IGNORE)

    @jax.jit
    def run(params: Any, inputs: dict[str, jax.Array]) -> Outputs:
        model = Clip(config).bind({"params": params})
        tokens = model.visual_tokens(inputs["pixel_values"])
        ids = inputs["input_ids"]
        embeddings = model.embed_tokens(ids)
        hidden = model.text_hidden_states(embeddings)
        end = end_positions(ids, config.text.eos_token_id)
        image, text = model.encode_image(inputs["pixel_values"]), model.encode_text(ids)
        scale = jnp.exp(params["logit_scale"])
        outputs = {
            "image_embeds": image,
            "vision_last_hidden_state": tokens,
            "vision_pooler_output": model.vision.pool(tokens),
            "text_embeds": text,
            "text_last_hidden_state": hidden,
            "text_pooler_output": hidden[jnp.arange(len(ids)), end],
            "logits_per_image": scale * normalised(image) @ normalised(text).T,
        }
        if "attention_mask" in inputs:
            masked = model.text_hidden_states(embeddings, inputs["attention_mask"])
            outputs["text_last_hidden_state_masked"] = masked
        if "pseudo_tokens" in inputs:
            put_in = overwrite_tokens(
                embeddings, inputs["pseudo_positions"], inputs["pseudo_tokens"]
            )
            outputs["pseudo_text_embeds"] = model.encode_text(ids, put_in)
            outputs["pseudo_text_last_hidden_state"] = model.text_hidden_states(put_in)
        return outputs

    inputs = dict(fixture.inputs)
    inputs["pixel_values"] = nhwc(inputs["pixel_values"])
    return run(params, inputs)


def _params(fixture: Any, config: ClipConfig) -> Any:
    return convert.to_ours(
        fixture.params, open_clip.names(config), ignore=open_clip.IGNORE, what=fixture.path.name
    )


def open_clip_model(fixture: Any) -> Outputs:
    """OpenCLIP's encode_image and encode_text, and the maps of a ResNet."""
    config = open_clip.from_open_clip(fixture.config)

    @jax.jit
    def run(params: Any, pixels: jax.Array, ids: jax.Array) -> Outputs:
        model = Clip(config).bind({"params": params})
        image, text = model.encode_image(pixels), model.encode_text(ids)
        outputs = {
            "encode_image": image,
            "encode_text": text,
            "encode_image_normalized": normalised(image),
            "encode_text_normalized": normalised(text),
        }
        if isinstance(config.vision, ResNetConfig):
            outputs["visual_stem"] = nchw(model.vision.stem(pixels))
            outputs["visual_layer4"] = nchw(model.vision.feature_map(pixels))
        return outputs

    return run(_params(fixture, config), nhwc(fixture.inputs["image"]), fixture.inputs["text"])


def openai_clip(fixture: Any) -> Outputs:
    """OpenAI's names, and SEARLE's encode_with_pseudo_tokens: one, several, broadcast."""
    config = open_clip.from_openai(fixture.config)
    inputs, params = fixture.inputs, _params(fixture, config)

    @jax.jit
    def run(params: Any, pixels: jax.Array, ids: jax.Array) -> Outputs:
        model = Clip(config).bind({"params": params})
        return {"encode_image": model.encode_image(pixels), "encode_text": model.encode_text(ids)}

    @jax.jit
    def put_in(params: Any, ids: jax.Array, at: jax.Array, pseudo_words: jax.Array) -> jax.Array:
        model = Clip(config).bind({"params": params})
        pseudo_words = jnp.broadcast_to(pseudo_words, (len(ids), *pseudo_words.shape[1:]))
        embeddings = overwrite_tokens(model.embed_tokens(ids), at, pseudo_words)
        return model.encode_text(ids, embeddings)

    outputs = run(params, nhwc(inputs["image"]), inputs["text"])
    for suffix, ids in (("", "text"), ("_two", "text_two"), ("_broadcast", "text")):
        at = placeholder_positions(inputs[ids], DOLLAR)
        outputs[f"encode_with_pseudo_tokens{suffix}"] = put_in(
            params, inputs[ids], at, inputs[f"pseudo_tokens{suffix}"]
        )
    return outputs


def preprocess(fixture: Any) -> Outputs:
    """All transforms on uint8 images."""
    size, ratio = fixture.config["dim"], fixture.config["target_ratio"]
    transforms = {
        "targetpad": images.targetpad(size, ratio),
        "squarepad": images.squarepad(size),
        "clip": images.clip(size),
        "blip": images.blip(size),
    }
    outputs = {}
    for name, pixels in fixture.inputs.items():
        k, image = name.removeprefix("image"), Image.fromarray(pixels)
        for kind, transform in transforms.items():
            made = transform(image)
            mean, std = np.asarray(transform.statistics, np.float32).reshape(2, 1, 1, 3)
            scaled = (made.astype(np.float32) / np.float32(255) - mean) / std
            outputs[f"{kind}{k}"] = scaled.transpose(2, 0, 1)
            outputs[f"{kind}_uint8_{k}"] = made
        padded = transforms["targetpad"].padded(image)
        outputs[f"padded_hw{k}"] = np.array(padded.size[::-1])
    return outputs


def installed_clip_merges() -> list[tuple[str, str]] | None:
    """CLIP's merges out of a package that carries them; None where none is installed.

    The vocabulary is not ours to ship. open_clip_torch has it as a file, instant-clip-tokenizer
    compiled in, both as the text it was published as. Neither is imported.
    """
    for package, pattern in (("open_clip", "bpe_simple_vocab_*.txt.gz"), (INSTANT, "*.so")):
        spec = importlib.util.find_spec(package)
        folders = [peers.APART / package, *((spec and spec.submodule_search_locations) or ())]
        for file in (f for folder in folders for f in Path(folder).glob(pattern)):
            data = file.read_bytes()
            data = gzip.decompress(data) if file.suffix == ".gz" else data
            start = data.find(b"i n\nt h\na n\n")
            if start >= 0:
                lines = data[start : start + 1_500_000].split(b"\n", CLIP_MERGES)[:CLIP_MERGES]
                first_second = (line.decode().split() for line in lines)
                return [(first, second) for first, second in first_second]
    return None


def clip_tokens(fixture: Any) -> Outputs:
    """Token ids of CLIP's own vocabulary."""
    merges = installed_clip_merges()
    if merges is None:
        raise Skip("CLIP's vocabulary is not here: pip install --no-deps open_clip_torch")
    meta = fixture.meta
    tokenizer = Tokenizer(
        clip_bpe(merges),
        context_length=meta["context_length"],
        bos_id=meta["sot_id"],
        eos_id=meta["eot_id"],
        pad_id=meta["pad_id"],
    )
    return {"ids": tokenizer(fixture.inputs["texts"], length=meta["context_length"])}


def circo(fixture: Any) -> Outputs:
    """mAP@k, Recall@k and mAP@10 per aspect, from features."""
    data = fixture.inputs
    where = {int(image): i for i, image in enumerate(data["index_ids"])}
    targets = np.vectorize(lambda x: where.get(x, -1))(data["gt_img_ids"]).astype(np.int32)
    # the single target of Recall@k is the first ground truth
    single = np.vectorize(where.get)(data["target_img_id"])
    for row, first in zip(targets, single, strict=True):
        place = int(np.argmax(row == first))
        row[[0, place]] = row[[place, 0]]
    query, gallery = unit(data["query_features"]), unit(data["index_features"])
    ranked = ranking.rank(query, gallery, k=51, targets=targets)
    names = fixture.config["semantic_aspects"]
    aspects = tuple(
        tuple(n for n, on in zip(names, row, strict=True) if on) for row in data["semantic_aspects"]
    )
    count = len(targets)
    outcome = protocols.Outcome(ranked.target_ranks, np.full(count, -1), ("",) * count, aspects)
    found = protocols.measure(protocols.CIRCO, outcome)
    precision = np.array([found[f"mAP@{k}"].value for k in (5, 10, 25, 50)])
    recall = np.array([found[f"R@{k}"].value for k in (5, 10, 25, 50)])
    return {
        "top50_ids": data["index_ids"][ranked.top[:, :50]],
        "map_at": precision / 100,
        "recall_at": recall / 100,
        "semantic_map_at10": np.array([found[f"mAP@10/{n}"].value for n in names]) / 100,
        "searle_map_at_pct": precision,
        "searle_recall_at_pct": recall,
        # says of the inputs that their order does not hang on rounding; nothing to compute
        "min_top50_gap": fixture.expected["min_top50_gap"],
    }


def cirr(fixture: Any) -> Outputs:
    """Recall@k and Recall_subset@k, from features."""
    data = fixture.inputs
    query, gallery = unit(data["query_features"]), unit(data["index_features"])
    target, reference = data["target_index"][:, None], data["reference_index"]
    ranked = ranking.rank(query, gallery, k=50, targets=target, exclude=reference)
    members = data["group_members"]
    members = np.where(members == reference[:, None], -1, members)
    subset = ranking.rank_candidates(query, gallery, members, target)
    count = len(target)
    outcome = protocols.Outcome(
        ranked.target_ranks, subset.target_ranks[:, 0], ("",) * count, ((),) * count
    )
    found = protocols.measure(protocols.CIRR, outcome)
    return {
        "top50_index": ranked.top,
        "target_rank": ranked.target_ranks[:, 0],
        "recall_at": np.array([found[f"R@{k}"].value for k in (1, 5, 10, 50)]),
        "group_recall_at": np.array([found[f"Rs@{k}"].value for k in (1, 2, 3)]),
    }


def fashioniq(fixture: Any) -> Outputs:
    """Recall@k of one category, from features."""
    data = fixture.inputs
    target = data["target_index"][:, None]
    query, gallery = unit(data["query_features"]), unit(data["index_features"])
    ranked = ranking.rank(query, gallery, k=50, targets=target)
    count = len(target)
    outcome = protocols.Outcome(
        ranked.target_ranks, np.full(count, -1), ("dress",) * count, ((),) * count
    )
    found = protocols.measure(protocols.FASHIONIQ, outcome)
    return {
        "target_rank": ranked.target_ranks[:, 0],
        "recall_at": np.array([found["R@10"].value, found["R@50"].value]),
    }


def spherical_interpolation(fixture: Any) -> Outputs:
    """Slerp at every weight of the config."""
    v0, v1 = fixture.inputs["v0"], fixture.inputs["v1"]
    interpolate = jax.jit(slerp)  # of any weight
    return {f"slerp_t{t}": interpolate(v0, v1, t) for t in fixture.config["t"]}


def info_nce(fixture: Any) -> Outputs:
    """Symmetric InfoNCE and its gradients."""
    inputs = [fixture.inputs[k] for k in ("image_features", "text_features", "logit_scale")]
    loss, grads = jax.jit(jax.value_and_grad(losses.info_nce, argnums=(0, 1, 2)))(*inputs)
    names = ("grad_image_features", "grad_text_features", "grad_logit_scale")
    return {"loss": loss, **dict(zip(names, grads, strict=True))}


def composed_diffusion(fixture: Any) -> Outputs:
    """CompoDiff's denoiser, its parts, guidance, and sampling with stored noise."""
    inputs = {name: jnp.asarray(x) for name, x in fixture.inputs.items()}
    config = compodiff_weights.config_of(fixture.params)
    params = compodiff_weights.to_params(fixture.params, fixture.path.name)
    denoiser = compodiff.Denoiser(config)
    table = schedule.cosine(config.timesteps)
    image, mask, x = inputs["image_cond"][:, 0], inputs["input_mask"], inputs["noisy_image_embed"]
    time = inputs["timestep"][:, None]
    weights = jnp.asarray([fixture.config["cond_scale"]])
    # the fixture's "timesteps" count one more than the evaluations of the network
    steps = fixture.config["sample_steps"] - 1
    noise = jnp.concatenate([inputs["initial_noise"][None], inputs["step_noise"]])

    @jax.jit
    def run(params: Any) -> Outputs:
        model = denoiser.bind({"params": params})
        passes = [
            model.condition(text, reference, mask)
            for text, reference in (
                (inputs["text_cond"], image),
                (inputs["negative_text_cond"], image),
                (inputs["negative_text_cond"], jnp.zeros_like(image)),
            )
        ]
        stacked = jax.tree.map(sampling.stack_branches, *passes)

        def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
            shape = (3 * len(image), 1)
            time = jnp.repeat(time, 3)[:, None] if time.ndim else jnp.full(shape, time)
            return denoiser.apply({"params": params}, x, time, stacked, method="denoise")

        guided = sampling.guided(denoise, weights)
        sample, (path, predicted) = sampling.ddim(guided, table, steps, lambda draw: noise[draw])
        return {
            "net_forward": model(x, time, inputs["text_cond"], image, mask),
            "net_forward_cond_scale": guided(x, inputs["timestep"]),
            "time_embed": model.embed_time(time),
            "mask_embed": model.mask_embedding(mask.reshape(len(mask), 1, -1)),
            "rel_pos_bias": model.position_bias(),
            "sample": sample[:, 0],
            "sample_x_t": path,
            "sample_pred_x_start": predicted,
        }

    clean, start = inputs["image_cond"], inputs["initial_noise"]
    times = sampling.ddim_times(config.timesteps, steps)
    # v of arXiv 2202.00512, which the method does not use: from the same two tables
    bar, rest = (
        jnp.asarray(t)[time][..., None]
        for t in (table.sqrt_alphas_cumprod, table.sqrt_one_minus_alphas_cumprod)
    )
    return run(params) | {
        "sample_times": times,
        "n_step_noise_used": np.int32((times[1:] > 0).sum()),
        "q_sample": schedule.q_sample(table, clean, time, start),
        "predict_noise_from_start": schedule.predict_noise_from_start(table, clean, time, start),
        "calculate_v": bar * start - rest * clean,
    }


HANDLERS: dict[str, Callable[[Any], Outputs]] = {
    "clip_hf": hugging_face_clip,
    "clip_full_rule": hugging_face_clip,
    "clip_openai_pseudo": openai_clip,
    "open_clip": open_clip_model,
    "preprocess": preprocess,
    "clip_tokens": clip_tokens,
    "metrics_circo": circo,
    "metrics_cirr": cirr,
    "metrics_fiq": fashioniq,
    "slerp": spherical_interpolation,
    "open_clip_cliploss": info_nce,
    "compodiff": composed_diffusion,
}
