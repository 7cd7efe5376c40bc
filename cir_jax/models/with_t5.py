"""The image tower of a CLIP with the text hidden states of T5, or of a CLIP and T5: backbones for
CompoDiff's text conditions (arXiv 2303.11916, section 5.1 and table 7)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.errors import ConfigError
from cir_jax.models.backbone import TOWERS, Backbone, Pair
from cir_jax.models.t5 import T5Encoder


@dataclasses.dataclass(frozen=True, eq=False)
class WithT5(Pair):
    """text_model: the CLIP with the text tower, None = T5's states are the only ones.

    Parameters are {"image", "text", "t5"}, without "text" where there is no such tower. Token ids
    are those of CLIP, then those of T5 (`JoinedTokenizer`); T5's are as many as CLIP's, 77.
    """

    t5_model: T5Encoder

    @property
    def text_widths(self) -> tuple[int, ...]:
        own = () if self.text_model is None else (self.text_model.config.text.hidden_size,)
        return (*own, self.t5_model.config.d_model)

    @property
    def token_dim(self) -> int:
        return self.text_widths[0]

    def init(self, rng: jax.Array) -> Any:
        """Random parameters (float32)."""
        models = {"image": self.model, "text": self.text_model}
        params = {}
        for half, model in models.items():
            if model is not None:
                whole = Backbone(model, self.tokenizer, self.image_transform, "").init(rng)
                params[half] = {k: tree for k, tree in whole.items() if k in TOWERS[half]}
        ids = jnp.zeros((1, 4), jnp.int32)
        return params | {"t5": self.t5_model.init(rng, ids, ids == 0)["params"]}

    def text_conditions(self, params: Any, token_ids: jax.Array) -> tuple[jax.Array, ...]:
        """See `Backbone.text_conditions`: CLIP's states, then T5's."""
        states: tuple[jax.Array, ...] = ()
        tokenizer = self.tokenizer
        if self.text_model is not None:
            length = tokenizer.first.context_length
            states = (self.states_of(params, token_ids[:, :length], tokenizer.first),)
            token_ids, tokenizer = token_ids[:, length:], tokenizer.second
        visible = token_ids != tokenizer.pad_id
        return (*states, self.t5_model.apply({"params": params["t5"]}, token_ids, visible))

    def text_hidden_states(
        self, params: Any, token_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Raises ConfigError: `text_conditions` are what there is."""
        self._refuse()

    def embed_tokens(self, params: Any, token_ids: jax.Array) -> jax.Array:
        """Raises ConfigError, likewise."""
        self._refuse()

    def _with(self, **changes: Any) -> "Backbone":
        own = {"model": self.model.clone(**changes)}
        if self.text_model is not None:
            own["text_model"] = self.text_model.clone(**changes)
        # frozen, so its layers are never computed twice
        known = {name: x for name, x in changes.items() if name == "dtype"}
        return dataclasses.replace(self, **own, t5_model=self.t5_model.clone(**known))

    def _refuse(self) -> Any:
        raise ConfigError(
            f"backbone {self.weights_id}: texts are read by T5, which serves CompoDiff alone. Use "
            "a CLIP, BLIP or SigLIP for other methods."
        )
