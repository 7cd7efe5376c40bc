"""A backbone: a vision-language model behind one interface, whatever its family.

Composers talk to this interface only. It holds no parameters: every function takes `params`, the
tree of the wrapped Flax module.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import ConfigError, DataError, unknown
from cir_jax.input.images import PREPROCESSING, ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models import artemis, chunks
from cir_jax.models.artemis import Artemis, ArtemisConfig
from cir_jax.models.blip import Blip, BlipConfig, with_enc_token
from cir_jax.models.clip import Clip, ClipConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.models.siglip import Siglip, SiglipConfig
from cir_jax.models.transformer import check_token_ids

FAMILIES = {Clip: "clip", Blip: "blip", Siglip: "siglip", Artemis: "artemis"}


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """CLIP, BLIP, SigLIP or ARTEMIS' encoders, with tokenizer and image preprocessing.

    weights_id: name + content hash of the weights; stored in checkpoints, caches and results.
    """

    model: Clip | Blip | Siglip | Artemis
    tokenizer: Tokenizer
    image_transform: ImageTransform
    weights_id: str

    joint = True
    """Whether image and text features lie in one space, so that they can be compared and summed."""

    @property
    def config(self) -> ClipConfig | BlipConfig | SiglipConfig | ArtemisConfig:
        return self.model.config

    @property
    def family(self) -> str:
        """ "clip", "blip", "siglip" or "artemis"."""
        return FAMILIES[type(self.model)]

    @property
    def reads_padding(self) -> bool:
        """Whether texts must be context_length tokens long, as the text tower reads the padding."""
        return self.family == "siglip"

    @property
    def dim(self) -> int:
        """Joint dimension of image and text features."""
        return self.config.projection_dim

    @property
    def token_dim(self) -> int:
        """Width of token embeddings and of text hidden states."""
        return self.config.text.hidden_size

    @property
    def text_widths(self) -> tuple[int, ...]:
        """Widths of `text_conditions`."""
        return (self.token_dim,)

    @property
    def context_length(self) -> int:
        """Tokens of the longest text: CLIP 77, BLIP 35 (as it was trained; its tower takes 512),
        SigLIP 64."""
        return self.tokenizer.context_length

    def with_preprocessing(self, name: str) -> "Backbone":
        """Another image preprocessing than that of the weights: "clip", "targetpad" ...

        Raises ConfigError for other names.
        """
        if name not in PREPROCESSING:
            raise ConfigError(unknown("config.preprocessing", name, PREPROCESSING))
        own = self.image_transform
        made = dataclasses.replace(
            PREPROCESSING[name](own.crop), mean=own.mean, std=own.std, rescale=own.rescale
        )
        return dataclasses.replace(self, image_transform=made)

    def with_remat(self) -> "Backbone":
        """The same, its layers computed again in the backward pass (see `models.clip.blocks`)."""
        return self._with(remat=True)

    def with_dtype(self, dtype: Any) -> "Backbone":
        """The same, computing in `dtype`, over the same parameters.

        One object per type, as programs are compiled once per backbone.
        """
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else _with_dtype(self, dtype)

    def _with(self, **changes: Any) -> "Backbone":
        fields = (field.name for field in dataclasses.fields(self))
        models = {name: getattr(self, name) for name in fields if name.endswith("model")}
        return dataclasses.replace(
            self, **{name: model.clone(**changes) for name, model in models.items()}
        )

    @property
    def dtype(self) -> np.dtype:
        """Type of the computation; parameters have their own."""
        return np.dtype(self.model.dtype)

    @property
    def identity(self) -> dict[str, str]:
        """What of a backbone its features depend on, beside the preprocessing; for their stores."""
        products = "highest" if self.dtype == np.float32 else "default"
        return {"weights": self.weights_id, "dtype": self.dtype.name, "products": products}

    def full_precision(self) -> contextlib.AbstractContextManager:
        """Inside, a float32 backbone's products are of float32 on every device.

        Of themselves GPUs round their factors to TF32 and TPUs to bfloat16. Another type is left
        alone. Training never asks for it: there speed counts more.
        """
        if self.dtype == np.float32:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    def init(self, rng: jax.Array) -> Any:
        """Random parameters (float32)."""
        size = self.config.vision.image_size
        images = jnp.zeros((1, size, size, 3))
        token_ids = jnp.zeros((1, 4), jnp.int32)
        return self.model.init(rng, images, token_ids)["params"]

    def encode_image(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float images -> float32[batch, dim], un-normalised."""
        return self._see(params, images, "encode_image").astype(jnp.float32)

    def visual_tokens(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float images -> float[batch, tokens, vision width]."""
        return self._see(params, images, "visual_tokens")

    @property
    def visual_shape(self) -> tuple[int, int]:
        """Tokens and width of `visual_tokens` of one image, of a ViT."""
        vision = self.config.vision
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (self.family != "siglip"), vision.hidden_size

    def project_image(self, params: Any, visual_tokens: jax.Array) -> jax.Array:
        """A BLIP's float[batch, tokens, vision width] -> float32[batch, dim], un-normalised: what
        `encode_image` gives, where both are wanted of one pass."""
        return self._apply(params, visual_tokens, method="project_image").astype(jnp.float32)

    def embed_tokens(self, params: Any, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim]."""
        return self._apply(params, token_ids, method="embed_tokens")

    def encode_text(
        self,
        params: Any,
        token_ids: jax.Array,
        embeddings: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """int32[batch, length] -> float32[batch, dim], un-normalised.

        embeddings: token embeddings with pseudo-words put in, in place of the embedded ids.
        attention_mask: of a CLIP, bool[batch, length], True where a key may be attended to; None =
        as in training.
        """
        self._check_length(token_ids)
        if embeddings is None:
            # the whole batch, so that the error names its row
            check_token_ids(token_ids, self.config.text.vocab_size)
        rows = (token_ids, embeddings)
        if attention_mask is not None:
            rows += (attention_mask,)
        return self._read(params, *rows, method="encode_text").astype(jnp.float32)

    def text_hidden_states(
        self, params: Any, token_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim] after the final norm.

        attention_mask: bool[batch, length], True where a key may be attended to; None = as in
        training: all for CLIP, which is causal, and for SigLIP, all but the padding for BLIP.
        Raises ConfigError for ARTEMIS, whose text tower is no transformer.
        """
        if self.family == "artemis":
            raise ConfigError(
                f"backbone {self.weights_id}: ARTEMIS' words have no hidden states that other "
                "methods read. Set config.backbone to a CLIP, BLIP or SigLIP."
            )
        self._check_length(token_ids)
        if attention_mask is None and self.family == "blip":
            attention_mask = token_ids != self.config.text.pad_token_id
        embeddings = self._apply(params, token_ids, method="embed_tokens")
        return self._read(params, embeddings, attention_mask, method="text_hidden_states")

    def text_conditions(self, params: Any, token_ids: jax.Array) -> tuple[jax.Array, ...]:
        """int32[batch, length] -> float[batch, length, width] of each text encoder there is: hidden
        states of all positions, padding too, which no position sees (unless the tower was trained
        to)."""
        return (self.states_of(params, token_ids, self.tokenizer),)

    def states_of(self, params: Any, token_ids: jax.Array, tokenizer: Tokenizer) -> jax.Array:
        """The one of the backbone's own text tower."""
        if self.reads_padding:
            return Backbone.text_hidden_states(self, params, token_ids)
        return Backbone.text_hidden_states(
            self, params, token_ids, visible(token_ids, tokenizer.eos_id)
        )

    def match(
        self,
        params: Any,
        token_ids: jax.Array,
        visual_tokens: jax.Array,
        embeddings: jax.Array | None = None,
    ) -> jax.Array:
        """float32[batch, 2]: logits (no match, match) of each text with its own image.

        BLIP's matching encoder: the text tower with cross-attention to visual_tokens, float[batch,
        tokens, vision width]. The start token becomes [ENC], as in BLIP's training and retrieval
        (its ITM demo and transformers leave [CLS]: that is `Blip.match`).
        embeddings: as for `encode_text`. Raises ConfigError for backbones without this encoder.
        """
        if self.family != "blip":
            raise ConfigError(
                f"backbone {self.weights_id}: a {self.family.upper()} has no matching encoder. "
                "Use a BLIP, --config.backbone=Salesforce/blip-itm-base-coco."
            )
        token_ids = with_enc_token(jnp.asarray(token_ids), self.config)
        if embeddings is not None:
            first = self.embed_tokens(params, token_ids[:, :1])
            embeddings = jnp.concatenate([first.astype(embeddings.dtype), embeddings[:, 1:]], 1)
        logits = self._read(params, token_ids, visual_tokens, embeddings, method="match")
        return logits.astype(jnp.float32)

    def _see(self, params: Any, images: jax.Array, method: str) -> jax.Array:
        vision = self.config.vision

        def see(params: Any, images: jax.Array) -> jax.Array:
            return self._apply(params, self._pixels(images), method=method)

        if isinstance(vision, ResNetConfig | artemis.ResNetConfig):
            return see(params, images)
        tokens = math.prod(images.shape[1:3]) // vision.patch_size**2 + 1
        return self._in_chunks(see, params, (images,), tokens, vision.intermediate_size)

    def _read(self, params: Any, *rows: Any, method: str) -> jax.Array:
        def read(params: Any, *rows: Any) -> jax.Array:
            return self._apply(params, *rows, method=method)

        return self._in_chunks(
            read, params, rows, rows[0].shape[1], self.config.text.intermediate_size
        )

    def _in_chunks(self, encode: Any, params: Any, rows: Any, tokens: int, hidden: int) -> Any:
        if self.dtype != np.float32:
            return encode(params, *rows)
        return chunks.over_rows(encode, params, rows, chunks.activation_bytes(tokens, hidden))

    def _apply(self, params: Any, *args: Any, method: str) -> jax.Array:
        return self.model.apply({"params": params}, *args, method=method)

    def _check_length(self, token_ids: jax.Array) -> None:
        if self.reads_padding and token_ids.shape[1] != self.context_length:
            raise DataError(
                f"texts of {token_ids.shape[1]} tokens: backbone {self.weights_id} reads the "
                f"padding, too, and was trained on {self.context_length}. Take the ids as its "
                "tokenizer gives them."
            )

    def _pixels(self, images: jax.Array) -> jax.Array:
        return pixels(images, self.image_transform)


@functools.lru_cache(maxsize=8)
def _with_dtype(backbone: Backbone, dtype: np.dtype) -> Backbone:
    return backbone._with(dtype=dtype.type)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair(Backbone):
    """The image tower of one CLIP and the text tower of another, as CompoDiff's larger release.

    model: the CLIP with the image tower, text_model: the one with the text tower. Parameters are
    {"image": ..., "text": ...}, without the towers that are not used. Their features are not in one
    space: there are image features and text hidden states, but no text features.
    """

    text_model: Clip

    joint = False

    @property
    def token_dim(self) -> int:
        return self.text_model.config.text.hidden_size

    def init(self, rng: jax.Array) -> Any:
        """Random parameters (float32)."""
        halves = {
            half: Backbone(model, self.tokenizer, self.image_transform, "").init(rng)
            for half, model in (("image", self.model), ("text", self.text_model))
        }
        return {
            half: {name: tree for name, tree in params.items() if name in TOWERS[half]}
            for half, params in halves.items()
        }

    def encode_text(
        self,
        params: Any,
        token_ids: jax.Array,
        embeddings: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Raises ConfigError: see above."""
        raise ConfigError(
            f"backbone {self.weights_id}: two models' towers, whose features are not in one space; "
            "it serves methods that read text hidden states (CompoDiff). Use one model for others."
        )

    def _apply(self, params: Any, *args: Any, method: str) -> jax.Array:
        if method in ("encode_image", "visual_tokens"):
            return self.model.apply({"params": params["image"]}, *args, method=method)
        return self.text_model.apply({"params": params["text"]}, *args, method=method)


def visible(token_ids: jax.Array, eos_id: int) -> jax.Array:
    """bool[batch, length]: the positions of a text, padding left out."""
    end = jnp.argmax(token_ids == eos_id, axis=-1)
    return jnp.arange(token_ids.shape[1])[None] <= end[:, None]


TOWERS = {
    "image": ("vision", "visual_projection", "logit_scale"),
    "text": ("text", "logit_scale"),
}
"""What of a CLIP's parameters each half of a `Pair` has; the scale belongs to the whole module."""


def pixels(images: jax.Array, transform: ImageTransform) -> jax.Array:
    """uint8[batch, height, width, 3] -> normalised float32; float images are so already.

    Raises DataError for other types, and for floats that no pixel becomes, 0 to 255 above all,
    where their values are known: not inside `jax.jit`.
    """
    # uint8 crosses to the device four times as fast; the normalisation is one fused operation
    mean, std = np.asarray(transform.statistics, np.float32).reshape(2, 1, 1, 1, 3)
    scale = np.float32(1 / transform.rescale)
    if images.dtype == jnp.uint8:
        return (images.astype(jnp.float32) / scale - mean) / std
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise DataError(
            f"images of type {images.dtype}; expected uint8 of 0 to 255, or normalised floats. "
            "Convert them: images.astype(numpy.uint8)."
        )
    if isinstance(images, jax.core.Tracer) or not images.size:
        return images
    with jax.ensure_compile_time_eval():  # known values, be it inside of another's trace
        low, high = (float(end(jnp.asarray(images, jnp.float32))) for end in (jnp.min, jnp.max))
    least, most = float(np.min(-mean / std)), float(np.max((255 / scale - mean) / std))
    slack = 4 * (most - least)  # noise may be added: what is refused is another scale
    if not (low >= least - slack and high <= most + slack):  # NaN, too
        raise DataError(
            f"float images of {low:.4g} to {high:.4g}; expected normalised ones, which are within "
            f"{least:.4g} and {most:.4g} here. Give uint8 images of 0 to 255 as they are, or "
            "(pixels - mean) / std with Backbone.image_transform.statistics and pixels of 0 to 1."
        )
    return images
