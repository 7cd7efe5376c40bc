"""CompoDiff: composed retrieval by latent diffusion (arXiv 2303.11916).

A transformer denoises the target's image embedding z, given the noisy embedding, the time t and the
conditions: text hidden states c_T, reference image embedding z_R, mask c_M. It predicts z itself.

    stage 1, text to image    E || z - net(z^(t), t | c_T) ||^2                              (1)
    stage 2, masked           E || z - net(z_masked^(t), t | c_T, z_masked, c_M) ||^2        (2)
    stage 2, triplet          E || z_T - net(z_T^(t), t | c_T, z_R, c_M) ||^2                (3)

Conditions but the mask are dropped at random in training, so that sampling can extrapolate:

    x0 = net(null, null) + w_I [net(null, z_R) - net(null, null)]
                         + w_T [net(c_T, z_R) - net(null, z_R)]                              (4)

Null text: hidden states of the empty prompt; null image and null mask: zeros. A negative text
takes the place of the null text. The mask stays in all three passes.

Paper and released code (navervision/CompoDiff; its training code was never released):
* (4) is printed for "epsilon", but the network predicts z, and that is what is guided, as here.
* Stage 2 picks one objective per step, with 30, 30 and 40 %. Here the rows of one batch are mixed:
  the same expected gradient with less variance, and one compiled program for both stages.
* "Dropout 0.1" (Table A.1) is ambiguous; the released network has none, so it is read as the rate
  at which conditions are dropped, text and image independently: `drop_text`, `drop_image`.
* The released sampler is DDIM with eta = 1. Its "timesteps" are one more than its evaluations of
  the network; its demo adds the one, and so does `steps` here (Table 4 starts at 1).
* The result is the mean over `samples_per_query` noises, then (1 - w) x + w z_R with w =
  `source_mixing`; the paper mentions neither. The code's default is 4 samples, its README's 2.
* All `context_length` text positions are conditions, padding too (`padding` "hidden" leaves it
  out: other numbers, but texts need be no longer than they are). In the text tower no position
  sees padding (the release passes the attention mask). The release encodes a negative text under
  the positive text's mask, a slip that is not copied: each text has its own mask here.
* The released weights take image embeddings of CLIP L/14 and hidden states of OpenCLIP bigG, so
  their backbone has the image tower of one and the text tower of the other (dim 768, token_dim
  1280). In the paper's tables both are L/14 (optionally with T5-XL), or both G/14.
* Masked pixels of a reference are mean grey in the release (zeros after normalisation), Gaussian
  noise in the paper: `mask_fill`, done to the image before it comes here (composers/conditions.py).
  1 in a mask = may change.
* Equation (2) noises the masked image; the released sampler starts from noise alone, whatever is
  masked. `noised_reference` r > 0 starts from the reference instead, noised as at time (1 - r) T.
* T5 beside CLIP (table 7): its states are brought to CLIP's width by a perceptron of one layer, as
  the paper says, and stand behind CLIP's, of which it says nothing. Backbone "IMAGES+TEXTS+T5".
* `conditioning` "tokens" is "Prior-like" of table 5, whose details the paper leaves open: see
  models/denoiser.py.

Defaults are the released ones: `depth` 12, `heads` 16 of `dim_head` 64 (8 in cross-attention,
which the released code does not configure), `guidance` (1.5, 7.5) from Figure 10, `steps` 10,
`source_mixing` 0.1, `feature_scale` "none" = CLIP's projections as they come. "unit_variance" =
unit features times sqrt(dim), for backbones whose projections are far from the unit variance that
the noise has.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.diffusion.sampling import ddim, guided, stack_branches
from cir_jax.diffusion.schedule import cosine, q_sample
from cir_jax.errors import ConfigError, DataError, unknown
from cir_jax.input import masks
from cir_jax.models.backbone import Backbone, visible
from cir_jax.models.denoiser import (
    CONDITIONING,
    Conditions,
    Denoiser,
    DenoiserConfig,
    TextStates,
    transposed,
)
from cir_jax.sharding.constraints import over_tensor
from cir_jax.sharding.placement import to_host
from cir_jax.weights import compodiff as released
from cir_jax.weights import files, official

FEATURE_SCALES = ("none", "unit_variance")
PADDING = ("read", "hidden")


def check_fractions(**values: float) -> None:
    """Raises ConfigError for what is not from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value}: expected a fraction from 0 to 1")


class CompoDiff(Composer):
    """`params` are the denoiser's; `frozen["backbone"]` the backbone's."""

    trained = True
    pools_text = False
    official_format = "model.safetensors of CompoDiff-Aesthetic, or a training file {ema_model}"
    official_files = ("model.safetensors", "pytorch_model.bin")
    alone = True
    conditions = (
        *("guidance", "negative_text", "mask", "steps", "samples_per_query", "seed"),
        *("source_mixing", "noised_reference"),
    )
    inference_settings = (
        *("guidance", "steps", "samples_per_query", "source_mixing", "noised_reference"),
        "mask_fill",
    )

    def __init__(
        self,
        backbone: Backbone,
        depth: int = 12,
        heads: int = 16,
        dim_head: int = 64,
        cross_heads: int = 8,
        timesteps: int = 1000,
        drop_text: float = 0.1,
        drop_image: float = 0.1,
        guidance: tuple[float, float] = (1.5, 7.5),
        steps: int = 10,
        samples_per_query: int = 4,
        source_mixing: float = 0.1,
        noised_reference: float = 0.0,
        mask_fill: str = "noise",
        feature_scale: str = "none",
        conditioning: str = "cross_attention",
        padding: str = "read",
    ):
        super().__init__(backbone)
        for name, value, known in (
            ("feature_scale", feature_scale, FEATURE_SCALES),
            ("mask_fill", mask_fill, masks.FILLS),
            ("conditioning", conditioning, CONDITIONING),
            ("padding", padding, PADDING),
        ):
            if value not in known:
                raise ConfigError(unknown(name, value, known))
        if dim_head % 2 or backbone.dim % 2:
            raise ConfigError(
                f"dim_head={dim_head} and the backbone's dim={backbone.dim} must be even: rotary "
                "and time embeddings work on pairs"
            )
        hides = padding == "hidden"
        if hides and (conditioning == "tokens" or len(backbone.text_widths) > 1):
            raise ConfigError(
                "padding='hidden' is for one text encoder and conditioning='cross_attention': set "
                "--config.composer.padding=read."
            )
        self.pools_text = hides
        check_fractions(drop_text=drop_text, drop_image=drop_image)
        widths = backbone.text_widths
        self.config = DenoiserConfig(
            embed_dim=backbone.dim,
            text_dim=widths[0],
            depth=depth,
            heads=heads,
            dim_head=dim_head,
            cross_heads=cross_heads,
            timesteps=timesteps,
            more_text_dim=widths[1] if len(widths) > 1 else 0,
            conditioning=conditioning,
        )
        if len(widths) > 1 or conditioning != "cross_attention":
            self.official_format = ""  # what was released has one text encoder and cross-attention
        self.denoiser = Denoiser(self.config, backbone.dtype)
        self.schedule = cosine(timesteps)
        self.drop_text, self.drop_image = float(drop_text), float(drop_image)
        self.feature_scale, self.mask_fill = feature_scale, mask_fill
        self.null_token_ids = backbone.tokenizer([""], None if hides else backbone.context_length)
        self._sample_with(guidance, steps, samples_per_query, source_mixing, noised_reference)

    def _sample_with(
        self,
        guidance: tuple[float, float],
        steps: int,
        samples_per_query: int,
        source_mixing: float,
        noised_reference: float,
    ) -> None:
        if len(guidance) != 2:
            raise ConfigError(f"guidance={guidance}: expected two weights, (image, text)")
        if not all(math.isfinite(weight) for weight in guidance):
            raise ConfigError(f"guidance={guidance}: expected two finite weights, (image, text)")
        if not 1 <= steps <= self.config.timesteps:
            raise ConfigError(f"steps={steps}: expected 1 to timesteps={self.config.timesteps}")
        if samples_per_query < 1:
            raise ConfigError(f"samples_per_query={samples_per_query}: expected 1 or more")
        check_fractions(source_mixing=source_mixing, noised_reference=noised_reference)
        self.guidance = (float(guidance[0]), float(guidance[1]))
        self.steps, self.samples_per_query = steps, samples_per_query
        self.source_mixing, self.noised_reference = float(source_mixing), float(noised_reference)
        self.first = round((1 - self.noised_reference) * self.config.timesteps)
        if self.first < steps:
            raise ConfigError(
                f"noised_reference={noised_reference}: leaves {self.first} of "
                f"{self.config.timesteps} times, fewer than steps={steps}. Take a smaller share."
            )

    def varied(self, **settings: Any) -> "CompoDiff":
        """See the base class."""
        names = ("guidance", "steps", "samples_per_query", "source_mixing", "noised_reference")
        other = copy.copy(self)
        other._sample_with(**{name: getattr(self, name) for name in names} | settings)
        return other

    def init(self, rng: jax.Array) -> Params:
        c = self.config
        one = (
            jnp.zeros((1, 1, c.embed_dim)),
            jnp.zeros((1, 1), jnp.int32),
            self._one_of([jnp.zeros((1, 1, width)) for width in self.backbone.text_widths]),
            jnp.zeros((1, c.embed_dim)),
            self.no_mask(),
        )
        return self.denoiser.init(rng, *one)["params"]

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        """And the hidden states of the null text, which every query and training row needs."""
        compute = jax.jit(self.backbone.text_conditions)
        if shapes_only:
            states = jax.eval_shape(compute, backbone_params, self.null_token_ids)
            null = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), states)
        else:
            with self.backbone.full_precision():
                null = compute(backbone_params, self.null_token_ids)
            null = jax.tree.map(to_host, null)
        return super().freeze(backbone_params, shapes_only) | {"null_text": null}

    def for_one_query(self, params: Params) -> Params:
        """See the base class."""
        return jax.jit(transposed)(params)

    def read_official(self, path: Path, frozen: Params) -> Params:
        del frozen
        return released.to_params(files.read_tensors(path), str(path))

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        del frozen
        official.write(path, {"ema_model": released.to_tensors(params, self.config)})

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """Squared error of the predicted embedding of each row, and which objective the row is.

        batch:
        target_features    float32[batch, dim], or target_images uint8[batch, height, width, 3]
        reference_features, or reference_images, likewise; may be absent when no row has one
        has_reference      bool[batch]; False = equation (1), text to image. Absent: all rows have
        token_ids          int32[batch, length]
        mask               float[batch, 64, 64], optional. A row with a mask that is not zero is
                           equation (2): its reference is the masked target, and is noised.
                           Other rows with a reference are equation (3).
        """
        target = self.scaled(self.target_features(frozen, batch))
        image, has_image = self.image_condition(frozen, batch)
        mask = self.checked_mask(batch.get("mask", self.no_mask()))
        masked = has_image & (mask > 0).any(axis=(1, 2))
        time, noise, no_text, no_image = jax.vmap(self.draw)(rngs)
        ids, null_ids = self.of_one_length(batch["token_ids"], self.null_token_ids)
        text, null_text = self.hidden_states(frozen, ids), self.null_states(frozen, ids.shape[1])
        seen, null_seen = self.visible(ids), self.visible(null_ids)
        error = self.errors(
            params,
            target,
            q_sample(self.schedule, jnp.where(masked[:, None], image, target), time, noise),
            time,
            jax.tree.map(
                lambda null, own: jnp.where(no_text[:, None, None], null, own), null_text, text
            ),
            jnp.where(no_image[:, None], 0.0, image),
            mask,
            None if seen is None else jnp.where(no_text[:, None], null_seen, seen),
        )
        rows = {"error": error, "has_image": has_image}
        return rows | {"masked": masked} if "mask" in batch else rows

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over the rows of all objectives.

        Metrics: mse_text, mse_triplet and, for data with masks, mse_masked, of one objective each;
        0 where a batch has no rows of it.
        """
        error, has_image = rows["error"], rows["has_image"]
        groups = {"text": ~has_image, "triplet": has_image}
        if "masked" in rows:
            groups["masked"] = rows["masked"]
            groups["triplet"] = has_image & ~rows["masked"]
        metrics = {
            f"mse_{name}": jnp.sum(error * group) / jnp.maximum(jnp.sum(group), 1)
            for name, group in groups.items()
        }
        return error.mean(), metrics

    def draw(self, rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Of one row: time int32[], noise float32[dim], whether text and image are dropped."""
        time_rng, noise_rng, text_rng, image_rng = jax.random.split(rng, 4)
        return (
            jax.random.randint(time_rng, (), 0, self.config.timesteps),
            jax.random.normal(noise_rng, (self.config.embed_dim,)),
            jax.random.bernoulli(text_rng, self.drop_text),
            jax.random.bernoulli(image_rng, self.drop_image),
        )

    def errors(
        self,
        params: Params,
        target: jax.Array,
        noisy: jax.Array,
        time: jax.Array,
        text: TextStates,
        image: jax.Array,
        mask: jax.Array,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Mean squared error per row, float32[batch].

        target, noisy: float32[batch, dim]; time: int32[batch]; the rest as `Denoiser.condition`.
        """
        clean = self.denoiser.apply(
            {"params": params}, noisy[:, None], time[:, None], text, image, mask, visible
        )[:, 0]
        return jnp.mean(jnp.square(clean - target), axis=-1)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """float32[batch, dim] of unit norm; the same for the same rng.

        Besides `Query`'s, query may hold:
        negative_token_ids int32[batch, length], what the results should not show
        mask               float[batch, 64, 64], 1 = the text is about this region
        has_reference      bool[batch], False = text only
        guidance           float32[batch, 2], weights (image, text) instead of the constructor's
        source_mixing      float32[batch], instead of the constructor's
        query_index        int32[batch], default 0, 1, ...: the noise of a query depends on rng and
                           this number alone, not on the batch that the query happens to be in
        The reference of a row with a mask is without the region: see `mask_fill`.
        """
        params = over_tensor(params)  # once, not in each step
        image, _ = self.image_condition(frozen, query)
        index = query.get("query_index")
        if index is None:
            index = jnp.arange(query["token_ids"].shape[0], dtype=jnp.int32)

        def noise(draw: jax.Array) -> jax.Array:
            draw_rng = jax.random.fold_in(rng, draw)
            shape = (self.samples_per_query, self.config.embed_dim)
            return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(draw_rng, i), shape))(
                index
            )

        conditions = self.branches(params, frozen, query, image)
        weights = query.get("guidance", jnp.asarray([self.guidance], jnp.float32))

        def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
            return self.denoiser.apply(
                {"params": params}, x, time[None, None], conditions, method="denoise"
            )

        start = image[:, None] if self.noised_reference else None
        samples, _ = ddim(
            guided(denoise, weights),
            self.schedule,
            self.steps,
            noise,
            start=start,
            below=self.first,
        )
        mean = samples.mean(axis=1)
        mixed = query.get("source_mixing", jnp.full((1,), self.source_mixing))[:, None]
        return normalise((1 - mixed) * mean + mixed * image)

    def branches(
        self, params: Params, frozen: Params, query: Query, image: jax.Array
    ) -> Conditions:
        """Conditions of the three passes of equation (4), as `guided` wants them."""
        mask = self.checked_mask(query.get("mask", self.no_mask()))
        negative = query.get("negative_token_ids", self.null_token_ids)
        ids, null_ids = self.of_one_length(query["token_ids"], negative)
        text, length = self.hidden_states(frozen, ids), ids.shape[1]
        if "negative_token_ids" in query:
            null_text = self.hidden_states(frozen, null_ids)
        else:
            null_text = self.null_states(frozen, length)
        seen, null_seen = self.visible(ids), self.visible(null_ids)
        passes = [
            self.denoiser.apply({"params": params}, *given, mask, shown, method="condition")
            for *given, shown in (
                (text, image, seen),
                (null_text, image, null_seen),
                (null_text, jnp.zeros_like(image[:1]), null_seen),
            )
        ]
        return jax.tree.map(stack_branches, *passes)

    def hidden_states(self, frozen: Params, token_ids: jax.Array) -> TextStates:
        """int32[batch, length] -> float[batch, length, width]; of two text encoders, of each."""
        return self._one_of(self.backbone.text_conditions(frozen["backbone"], token_ids))

    def null_states(self, frozen: Params, length: int) -> TextStates:
        """Of the null text, float[1, length, width]; what is beyond it is hidden."""

        def padded(states: jax.Array) -> jax.Array:
            missing = 0 if not self.pools_text else length - states.shape[1]
            return jnp.pad(states, ((0, 0), (0, missing), (0, 0)))

        return self._one_of([padded(states) for states in frozen["null_text"]])

    def of_one_length(self, *texts: jax.Array) -> tuple[jax.Array, ...]:
        """Token ids [batch, length], padded: to the context where padding is read, as the towers
        were, else to the longest."""
        length = max(ids.shape[1] for ids in texts)
        if not self.pools_text:
            length = max(length, self.backbone.context_length)
        pad_id = self.backbone.tokenizer.pad_id
        widths = [((0, 0), (0, length - ids.shape[1])) for ids in texts]
        padded = zip(texts, widths, strict=True)
        return tuple(jnp.pad(ids, width, constant_values=pad_id) for ids, width in padded)

    def visible(self, token_ids: jax.Array) -> jax.Array | None:
        """Which positions are conditions, bool[batch, length]; None = all."""
        if not self.pools_text:
            return None
        return visible(token_ids, self.backbone.tokenizer.eos_id)

    @staticmethod
    def _one_of(states: Sequence[jax.Array]) -> TextStates:
        return states[0] if len(states) == 1 else tuple(states)

    def image_condition(
        self, frozen: Params, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Scaled reference features float32[batch, dim], zeros where there is none; bool[batch]."""
        rows = batch["token_ids"].shape[0]
        if "reference_features" not in batch and "reference_images" not in batch:
            return jnp.zeros((rows, self.config.embed_dim)), jnp.zeros(rows, bool)
        features = self.reference_features(frozen, batch)
        if features.shape != (rows, self.config.embed_dim):
            raise DataError(
                f"an image condition of shape {features.shape} for {rows} texts; expected "
                f"[{rows}, {self.config.embed_dim}], features of {self.backbone.weights_id}."
            )
        image = self.scaled(features)
        has_image = batch.get("has_reference", jnp.ones(rows, bool))
        return jnp.where(has_image[:, None], image, 0.0), has_image

    def scaled(self, features: jax.Array) -> jax.Array:
        """The backbone's un-normalised features in the scale that is diffused."""
        if self.feature_scale == "none":
            return features
        return normalise(features) * self.config.embed_dim**0.5

    def checked_mask(self, mask: jax.Array) -> jax.Array:
        """float32[batch or 1, mask_size, mask_size]. Raises DataError for another size."""
        size = self.config.mask_size
        if mask.ndim != 3 or mask.shape[1:] != (size, size):
            raise DataError(f"masks of shape {mask.shape}: expected [batch, {size}, {size}].")
        return mask.astype(jnp.float32)

    def no_mask(self) -> jax.Array:
        """float32[1, mask_size, mask_size], one row for all."""
        return jnp.zeros((1, self.config.mask_size, self.config.mask_size))
