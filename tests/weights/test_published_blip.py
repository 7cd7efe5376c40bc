"""Published directories of BLIP: the original's numbers, or a message."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.models.backbone import pixels
from cir_jax.weights import blip as convert_blip
from tests.weights import published, worlds
from tests.weights.published import MEAN, NOISE_5, NOISE_29, STD, near, random_tensors

pytestmark = pytest.mark.peer

BLIP_NOISE = NOISE_29 | {"transformers_version": "4.26.0.dev0"}
BLIP_TEXT = {
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 30522,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 64,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "is_decoder": True,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "blip_text_model",
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "projection_dim": 768,
    "sep_token_id": 102,
    "use_cache": True,
    "vocab_size": 30524,
}
BLIP_VISION = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dropout": 0.0,
    "eos_token_id": None,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "image_size": 384,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-05,
    "model_type": "blip_vision_model",
    "num_attention_heads": 1,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "pad_token_id": None,
    "patch_size": 16,
    "projection_dim": 512,
}


def blip(architecture, noise=BLIP_NOISE, version="torch_dtype", text=(), **more):
    about = {"architectures": [architecture], "image_text_hidden_size": 256, version: "float32"}
    about |= {"initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "blip"}
    towers = {
        "text_config": noise | BLIP_TEXT | dict(text),
        "vision_config": noise | BLIP_VISION,
    }
    return about | towers | {"projection_dim": 512, "transformers_version": None} | more


BLIP_5 = NOISE_5 | {"tf_legacy_loss": False, "dtype": "float32"}
BERT = {name: f"[{name[:-6].upper()}]" for name in
        ("cls_token", "mask_token", "pad_token", "sep_token", "unk_token")}  # fmt: skip
BERT_TOKENIZER = BERT | {"do_basic_tokenize": True, "do_lower_case": True, "never_split": None}
BERT_TOKENIZER |= {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": 512}
BERT_TOKENIZER |= {"processor_class": "BlipProcessor", "strip_accents": None}
BERT_TOKENIZER |= {"tokenize_chinese_chars": True, "tokenizer_class": "BertTokenizer"}
BLIP_IMAGES = MEAN | STD | {"do_normalize": True, "do_resize": True}
BLIP_IMAGES |= {"image_processor_type": "BlipImageProcessor"}
SQUARE = {"size": {"height": 384, "width": 384}, "size_divisor": 32, "do_pad": True}
SQUARE |= {"do_rescale": True, "resample": 3, "rescale_factor": 1 / 255}
BLIP_PROCESSOR = {"processor_class": "BlipProcessor"}

BASE, LARGE, VQA = (
    f"Salesforce__blip-{name}" for name in
    ("image-captioning-base", "image-captioning-large", "vqa-base")
)  # fmt: skip
BLIP_ROWS = {
    "Salesforce__BLIP": {
        "med_config.json": {
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": 30524,
            "encoder_width": 768,
            "add_cross_attention": True,
        }
    },
    BASE: {
        "config.json": blip("BlipForConditionalGeneration", _commit_hash=None),
        "preprocessor_config.json": BLIP_IMAGES | BLIP_PROCESSOR | {"size": 384},
    },
    LARGE: {
        "config.resaved-v5.json": blip(
            "BlipForConditionalGeneration",
            BLIP_5,
            "dtype",
            {"encoder_hidden_size": 64, "label_smoothing": 0.0},
            initializer_range=0.02,
            label_smoothing=0.0,
            tie_word_embeddings=True,
            transformers_version="5.5.4",
        ),
        "generation_config.resaved-v5.json": {"bos_token_id": 30522, "eos_token_id": 2}
        | {"pad_token_id": 0, "max_length": 20, "transformers_version": "5.5.4"},
        "processor_config.resaved-v5.json": BLIP_PROCESSOR
        | {"image_processor": BLIP_IMAGES | SQUARE | {"do_convert_rgb": True}},
        "tokenizer.resaved-v5.json.head": None,
        "tokenizer_config.resaved-v5.json": BERT_TOKENIZER
        | {"backend": "tokenizers", "is_local": False},
    },
    VQA: {
        "config.json": blip("BlipForQuestionAnswering", _commit_hash=None),
        "preprocessor_config.json": BLIP_IMAGES | BLIP_PROCESSOR | SQUARE,
        "special_tokens_map.json": BERT,
        "tokenizer.json.head": None,
        # model_input_names is there twice
        "tokenizer_config.json": BERT_TOKENIZER
        | {"name_or_path": "ybelkada/blip-image-captioning-base", "special_tokens_map_file": None},
    },
}
# case: models whose files lie in it, later ones before earlier ones
CAPTIONS = ["a photo of $ , that is red", "make it two Cats", "x"]
BLIP_CASES = {"base": (VQA, BASE), "large": (LARGE,), "vqa": (VQA,)}


def rows(case):
    """place -> (model, file)"""
    return {
        published.place(model, file): (model, file)
        for model in BLIP_CASES[case]
        for file in BLIP_ROWS[model]
    }


def tokenizer_json(vocabulary):
    """As the heads show it."""
    form = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    form |= {"special": True}
    template, ends = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}], ("[CLS]", "[SEP]")
    template += [{"Sequence": {"id": "A", "type_id": 0}}]
    template += [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    pair = [{"Sequence": {"id": "B", "type_id": 1}}]
    pair += [{"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    ids = {word: i for i, word in enumerate(vocabulary)}
    special = {word: {"id": word, "ids": [ids[word]], "tokens": [word]} for word in ends}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[word], "content": word, **form} for word in BERT.values()],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True}
        | {"handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": template}
        | {"pair": template + pair, "special_tokens": special},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 100, "vocab": ids},
    }


@pytest.fixture(scope="module")
def vocabulary():
    """30522 words, as BERT's; the model has two more, of which no tokenizer file knows."""
    words = worlds.WORDPIECES
    return [*words, *(f"word{i}" for i in range(30522 - len(words)))]


def write(path, case, vocabulary, architecture=""):
    """The directory; architecture: in place of the published one."""
    path.mkdir()
    for place, (model, file) in rows(case).items():
        value = BLIP_ROWS[model][file]
        if place == "config.json" and architecture:
            value = value | {"architectures": [architecture]}
        text = json.dumps(tokenizer_json(vocabulary) if value is None else value)
        if (model, place) == (VQA, "tokenizer_config.json"):
            names = json.dumps({"model_input_names": value["model_input_names"]})
            text = f"{text[:-1]}, {names[1:]}"
        (path / place).write_text(text)
    return path


def model_of(path):
    """The model that transformers makes of a config.json, with random weights saved beside it."""
    from safetensors.torch import save_file

    transformers = published.transformers()
    config = transformers.AutoConfig.from_pretrained(path)
    kind = getattr(transformers, config.architectures[0])
    tensors = random_tensors(kind(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return kind.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return published.picture(tmp_path_factory.mktemp("picture"))


def compare(model, backbone, params, path, picture, seen=None):
    """Ids, pixels, cosines, and logits of the matching head, from strings and a PNG.

    seen: the picture, where transformers would see another one.
    """
    import torch

    transformers = published.transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(CAPTIONS, padding="max_length", max_length=35, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = backbone.tokenizer(CAPTIONS, 35)
    np.testing.assert_array_equal(ids, inputs["input_ids"])
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    seen = seen or Image.open(picture)
    theirs = processor(seen, return_tensors="pt")["pixel_values"]
    transform = backbone.image_transform
    ours = transform(images.read(picture))[None]
    near(pixels(ours, transform), theirs.permute(0, 2, 3, 1), 1e-6)
    each = theirs.repeat(len(CAPTIONS), 1, 1, 1)
    with torch.no_grad():
        cosine = model(pixel_values=each, use_itm_head=False, **inputs).itm_score[:1]
        logits = model(pixel_values=each, **inputs).itm_score

    @jax.jit
    def run(params):
        tokens = backbone.visual_tokens(params, np.repeat(ours, len(CAPTIONS), 0))
        # transformers leaves [CLS], as this does
        match = backbone.model.apply({"params": params}, ids, tokens, method="match")
        return backbone.encode_image(params, ours), backbone.encode_text(params, ids), match

    image, text, match = run(params)
    image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    near(image @ text.T, cosine)
    near(match, logits, 2e-5)


@pytest.mark.parametrize("case", BLIP_CASES)
def test_retrieval(vocabulary, picture, tmp_path, case):
    """With the weights that all of this is for, which say it in the same way."""
    path = write(tmp_path / "blip", case, vocabulary, "BlipForImageTextRetrieval")
    model = model_of(path)
    backbone, params = weights.load(path)
    compare(model, backbone, params, path, picture)


@pytest.mark.parametrize("case", BLIP_CASES)
def test_as_published_they_are_other_models(vocabulary, tmp_path, case):
    """Captioning and question answering have no contrastive text encoder."""
    path = write(tmp_path / "blip", case, vocabulary)
    model_of(path)
    with pytest.raises(WeightsError, match="a BLIP without the contrastive text encoder"):
        weights.load(path)


def test_an_original_file_beside_its_config(vocabulary, picture, tmp_path):
    """Salesforce's file says all that med_config.json does; with it or without, the same."""
    import torch

    path = write(tmp_path / "blip", "vqa", vocabulary, "BlipForImageTextRetrieval")
    config = json.loads((path / "config.json").read_text())
    # not in that file, and so in all of them
    config["vision_config"] |= {"layer_norm_eps": 1e-6}
    (path / "config.json").write_text(json.dumps(config))
    model = model_of(path)
    made, params = weights.load(path)
    tensors = convert_blip.to_tensors(params, made.config, "salesforce")
    (tmp_path / "original").mkdir()
    file = tmp_path / "original" / "model_base.pth"
    torch.save({"model": {name: torch.tensor(t) for name, t in tensors.items()}}, file)
    (file.parent / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    beside = BLIP_ROWS["Salesforce__BLIP"]["med_config.json"]
    (file.parent / "med_config.json").write_text(json.dumps(beside))
    # its code drops what says how transparent a pixel is; transformers puts it on white
    opaque = Image.open(picture).convert("RGB")
    compare(model, *weights.load(file), path, picture, opaque)


def test_every_row_is_in_a_case():
    used = {row for case in BLIP_CASES for row in rows(case).values()}
    used.add(("Salesforce__BLIP", "med_config.json"))  # the test above
    assert used == {(model, file) for model, files in BLIP_ROWS.items() for file in files}
    assert len(used) == 13
