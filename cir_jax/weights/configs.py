"""Which fields of a Hugging Face `config.json` are read, change nothing, or are refused.

A field that is not known here may change the network (`use_rms_norm`, `qkv_bias`): it is an error,
as its model would otherwise give wrong features in silence.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cir_jax.errors import WeightsError

_ABOUT = """
    architectures auto_map custom_pipelines dtype finetuning_task id2label label2id model_type
    name_or_path num_labels problem_type task_specific_params tokenizer_class torch_dtype
    transformers_version transformers.js_config
"""
_TRAINING = """
    attention_dropout attention_probs_dropout_prob classifier_dropout dropout dropout_rate
    gradient_checkpointing hidden_dropout_prob initializer_factor initializer_range label_smoothing
    logit_scale_init_value tf_legacy_loss use_bfloat16
"""
_RUNNING = """
    attn_implementation chunk_size_feed_forward is_composition output_attentions
    output_hidden_states output_past output_scores return_dict return_dict_in_generate
    return_loss torchscript use_cache
"""
_TOKENS = """
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
"""
_DECODING = """
    add_cross_attention bad_words_ids begin_suppress_tokens cross_attention_hidden_size
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id is_decoder
    is_encoder_decoder length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_decoder_layers num_return_sequences prefix remove_invalid_values
    repetition_penalty scale_decoder_outputs suppress_tokens temperature tie_encoder_decoder
    tie_word_embeddings top_k top_p typical_p
"""
INERT = frozenset((_ABOUT + _TRAINING + _RUNNING + _TOKENS + _DECODING).split())
"""What transformers writes into every config, and what is for training or generation alone."""

_ONE_VALUE: Mapping[str, Any] = {"num_channels": 3, "pruned_heads": {}}
"""Fields with a meaning, and the only value that is built here."""

_REMEDIES = {
    "quantization_config": "Give the weights as they were before quantisation",
    "rope_scaling": "Give a model with learned positions",
}


def check(values: Mapping[str, Any], read: type | frozenset[str], what: str | Path) -> None:
    """Raises WeightsError naming the fields of `values` that are not known.

    read: the fields that the caller reads, or the dataclass made of them; null fields, and those
    that begin with an underscore, say nothing. what: the file, and the part of it.
    """
    if not isinstance(values, Mapping):
        raise WeightsError(f"{what}: expected a JSON object. Download or copy it again.")
    names = read if isinstance(read, frozenset) else {f.name for f in dataclasses.fields(read)}
    unknown = {}
    for name, value in values.items():
        if value is None or name in names or name in INERT or name.startswith("_"):
            continue
        if name not in _ONE_VALUE:
            unknown[name] = f"{name}={value!r}"[:60]
        elif value != _ONE_VALUE[name]:
            unknown[name] = f"{name}={value!r} (only {_ONE_VALUE[name]!r} is built here)"
    if unknown:
        listed = ", ".join(unknown[name] for name in sorted(unknown))
        remedy = next(
            (_REMEDIES[name] for name in sorted(unknown) if name in _REMEDIES),
            "Give a model that transformers builds without these fields, or, if they change "
            "nothing, take them out of the file",
        )
        raise WeightsError(
            f"{what}: {listed}: fields that are not known here and may change the network. "
            f"{remedy}."
        )
