"""Published directories of T5: the original's numbers, or a message."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cir_jax import weights
from tests.weights import published
from tests.weights.published import near, random_tensors

pytestmark = pytest.mark.peer

EXTRA = [f"<extra_id_{i}>" for i in range(100)]
PIECES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
T5_TOKENIZER = PIECES | {"extra_ids": 100, "additional_special_tokens": EXTRA}
T5_TOKENIZER |= {"model_max_length": 512}
CLASS = {"sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
GENERATION = {"_from_model_config": True, "decoder_start_token_id": 0, "eos_token_id": 1}
GENERATION |= {"pad_token_id": 0, "transformers_version": "4.27.0.dev0"}
TASKS = {"summarization": {"early_stopping": True, "num_beams": 4, "prefix": "summarize: "}}

T5 = {
    "d_ff": 40,
    "d_kv": 8,
    "d_model": 16,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_heads": 2,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
WHOLE, ENCODER = (
    {"architectures": [f"T5{name}"]} for name in ("ForConditionalGeneration", "EncoderModel")
)
V11 = T5 | {
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 2,
    "tie_word_embeddings": False,
}
DISTANCE = {"relative_attention_max_distance": 128}
XXL = V11 | DISTANCE | ENCODER | {"classifier_dropout": 0.0, "is_gated_act": True}
XXL |= {"dense_act_fn": "gelu_new", "use_cache": True}


def _special(form):
    return {"additional_special_tokens": EXTRA} | {k: form(v) for k, v in PIECES.items()}


def _token(content, strip=False):
    form = {"content": content, "lstrip": strip, "rstrip": strip, "normalized": False}
    return form | {"single_word": False}


# "tokenizer.json.head" -> whether the sentinels take the spaces beside them
T5_ROWS = {
    "google-t5__t5-large": {
        "config.json": T5 | WHOLE | {"n_positions": 512, "task_specific_params": TASKS},
        "generation_config.json": GENERATION,
        "tokenizer.json.head": False,
    },
    "google__flan-t5-large": {
        "config.json": V11 | WHOLE | DISTANCE | {"n_positions": 512, "use_cache": True},
        "generation_config.json": GENERATION,
        "special_tokens_map.json": _special(str),
        "tokenizer.json.head": False,
        "tokenizer_config.json": T5_TOKENIZER | CLASS | {"name_or_path": "google/t5-v1_1-large"},
    },
    "google__t5-v1_1-base": {
        "config.json": V11 | WHOLE | {"_name_or_path": "/somewhere/t5-v1_1-base"},
        "generation_config.json": GENERATION,
        "special_tokens_map.json": _special(str),
        "tokenizer_config.json": T5_TOKENIZER | {"name_or_path": "t5-small"},
    },
    "black-forest-labs__FLUX.1-dev__text_encoder_2": {
        # no feed_forward_proj: what it would mean, and one more activation
        "config.json": T5
        | {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "num_decoder_layers": 2}
        | {"tie_word_embeddings": False},
        "config.sdnext.json": XXL | {"torch_dtype": "bfloat16", "transformers_version": "4.43.3"},
    },
    "stabilityai__stable-diffusion-3-medium-diffusers__text_encoder_3": {
        "config.json": XXL | {"torch_dtype": "float16", "transformers_version": "4.41.2"},
    },
    "stabilityai__stable-diffusion-3-medium-diffusers__tokenizer_3": {
        "special_tokens_map.json": _special(_token),
        "tokenizer.json.head": True,
        "tokenizer_config.json": T5_TOKENIZER
        | CLASS
        | {"add_prefix_space": True, "clean_up_tokenization_spaces": True, "legacy": True}
        | {
            "added_tokens_decoder": {
                str(i): _token(content, i > 2) | {"special": True}
                for i, content in enumerate(["<pad>", "</s>", "<unk>"])
            }
        },
    },
}
# case: models whose files lie in it, their config, folder of the tower, of the tokenizer
T5_CASES = {
    "t5-large": ("google-t5__t5-large", "config.json", "", ""),
    "flan-t5-large": ("google__flan-t5-large", "config.json", "", ""),
    "t5-v1_1-base": ("google__t5-v1_1-base", "config.json", "", ""),
    "FLUX": ("black-forest-labs", "config.json", "text_encoder_2", "tokenizer_2"),
    "FLUX of sdnext": ("black-forest-labs", "config.sdnext.json", "text_encoder_2", "tokenizer_2"),
    "SD 3": ("stabilityai", "config.json", "text_encoder_3", "tokenizer_3"),
}
TEXTS = ["a photo of $ , that is red", "Two   dogs!", "x"]


def t5_rows(case):
    """place -> (model, file)"""
    models, config, *_ = T5_CASES[case]
    return {
        published.place(model, file): (model, file)
        for model, files in T5_ROWS.items()
        for file in files
        if model.startswith(models) and (file == config or not file.startswith("config"))
    }


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A directory with a spiece.model of few pieces, and the tokenizer.json transformers makes."""
    spm = pytest.importorskip("sentencepiece")
    path, written = tmp_path_factory.mktemp("pieces"), io.BytesIO()
    lines = [line for line in Path(__file__).read_text().splitlines() if "<" not in line] * 4
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(filter(str.strip, lines)),
        model_writer=written,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (path / "spiece.model").write_bytes(written.getvalue())
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tokenizer = published.transformers().AutoTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_t5(path, case, pieces):
    rows, tokens = t5_rows(case), path / T5_CASES[case][3]
    for place, (model, file) in rows.items():
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        value = T5_ROWS[model][file]
        if file.endswith(".head"):
            value, strip = json.loads((pieces / "tokenizer.json").read_text()), value
            for each in value["added_tokens"][3:]:
                each |= {"lstrip": strip, "rstrip": strip}
        (path / place).write_text(json.dumps(value))
    if not (tokens / "tokenizer.json").exists():
        tokens.mkdir(exist_ok=True)
        shutil.copy(pieces / "spiece.model", tokens)
    return path / T5_CASES[case][2]


@pytest.mark.parametrize("case", T5_CASES)
def test_t5(pieces, tmp_path, case):
    """The feed-forward layer is what transformers makes of the config, not what it says first."""
    import torch
    from safetensors.torch import save_file

    transformers, path = published.transformers(), write_t5(tmp_path, case, pieces)
    config = transformers.AutoConfig.from_pretrained(path)
    kind = (config.architectures or ["T5EncoderModel"])[0]
    tensors = random_tensors(getattr(transformers, kind)(config), config.dtype)
    tied = [name for name in tensors if name.endswith("embed_tokens.weight")]
    untied = json.loads((path / "config.json").read_text()).get("tie_word_embeddings") is False
    tied += [] if untied else ["lm_head.weight"]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in tied}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})

    model = transformers.T5EncoderModel.from_pretrained(path, dtype=torch.float32).eval()
    folder = tmp_path / T5_CASES[case][3]
    if not (folder / "tokenizer_config.json").exists():  # FLUX's was not seen
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=32, return_tensors="pt"
    )
    encoder, params = weights.load_encoder(path)
    ids = encoder.tokenizer(TEXTS, 32)
    np.testing.assert_array_equal(ids, inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.numpy()
    words = ids != 0
    near(np.asarray(encoder.hidden_states(params, ids))[words], expected[words])


def test_every_row_is_in_a_case():
    used = {row for case in T5_CASES for row in t5_rows(case).values()}
    assert used == {(model, file) for model, files in T5_ROWS.items() for file in files}
    assert len(used) == 18
