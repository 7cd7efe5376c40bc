"""ARTEMIS' checkpoints (naver/artemis): both encoders are a backbone, the networks on top a
composer's.

A checkpoint is {args, epoch, best_score, model, optimizer}, as its train.py writes it. The ids of
words are in the vocabulary that its vocab.py makes, NAME_vocab.pkl, which has to lie beside it. On
CIRR the image branch reads the features of a ResNet-152, which is not in the checkpoint: it is
torchvision's file, resnet152-*.pth, beside it. How CIRR's images were prepared for it is not
published; here it is as for ARTEMIS' other datasets.

What is written as a backbone, by `weights.save` or `begin`, is a directory with config.json,
tokenizer.json and the tensors under the same names.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input import images, vocabulary
from cir_jax.input.text import Tokenizer
from cir_jax.models.artemis import RECURRENT, Artemis, ArtemisConfig, ResNetConfig, WordConfig
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.placement import to_host
from cir_jax.weights import beside, convert, families, files, official, one_by_one, torch_files
from cir_jax.weights.one_by_one import Shardings

IGNORE = (r".*\.num_batches_tracked",)  # PyTorch's counter; only momentum=None uses it
CNN, IMAGE, TEXT = "img_enc.cnn", "img_enc.", "txt_enc."
HEADS = {"gem": "img_enc.fc", "mean": "img_enc.linear"}
"""Pool of the last map -> the linear layer on it; CIRR's is of features that are averages."""

PARTS = ("args", "epoch", "best_score", "optimizer")
"""Of a checkpoint, beside `model`."""


def read(
    source: files.Source,
    dtype: Any,
    params_dtype: Any,
    shardings: Shardings | None = None,
    **sizes: int,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters; see `backbones.load`. sizes: none is supported."""
    backbone = architecture(source, dtype, **sizes)
    tensors, what = source.tensors(), source.what()
    wanted = names(backbone.config)
    if not source.kind:
        tensors = _with_trunk(_encoders(tensors), source)
    params = convert.unread(tensors, wanted, ignore=IGNORE, what=what, dtype=params_dtype)
    images_, ids = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32), np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(backbone.model.init, jax.random.key(0), images_, ids)["params"]
    convert.check_shapes(params, shapes, what)
    settings = [backbone.tokenizer.identity, backbone.config.vision.pool]
    params, weights_id = one_by_one.read(source, params, settings, shardings)
    made = Backbone(backbone.model, backbone.tokenizer, backbone.image_transform, weights_id)
    return made, params


def architecture(source: files.Source, dtype: Any, **sizes: int) -> Backbone:
    """Backbone without its weights; a checkpoint says its sizes by them."""
    if sizes:
        raise WeightsError(
            f"{', '.join(f'{k}={v}' for k, v in sizes.items())}: ARTEMIS takes images of 224 "
            "pixels, and texts of any length. Leave it out."
        )
    if source.kind:
        try:
            config = ArtemisConfig.from_dict(source.config)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{source.directory / source.kind}: no config of ARTEMIS' encoders as it is "
                f"written here ({type(error).__name__}: {error}). Copy it again."
            ) from error
        tokenizer = Tokenizer.by_tokens(
            source.directory,
            context_length=config.text.max_position_embeddings,
            bos="<start>",
            eos="<end>",
            pad="<pad>",
        )
        if tokenizer.vocab_size != config.text.vocab_size:
            raise WeightsError(
                f"{source.directory}: tokenizer.json has {tokenizer.vocab_size} words, the model "
                f"embeddings of {config.text.vocab_size}. Copy both from where they were written."
            )
        transform = beside.image_transform(source.directory, "clip")
    else:
        tensors = source.tensors()
        if families.family(tensors) != "artemis":
            raise WeightsError(
                f"{source.what()}: tensors of {families.describe(tensors)}, expected ARTEMIS."
            )
        config = _config(_with_trunk(_encoders(tensors), source), source.what())
        tokenizer = _tokenizer(source, config)
        transform = images.artemis()
    return Backbone(Artemis(config, dtype), tokenizer, transform, f"{source.name}@untrained")


def write(path: Path, backbone: Backbone, params: Any, dtype: Any) -> None:
    """See `backbones.save`."""
    about = {
        files.HUGGING_FACE: backbone.config.to_dict(),
        beside.PREPROCESSING: backbone.image_transform.to_dict(),
    }
    tensors = to_tensors(params, backbone.config)
    beside.write(path, "model.safetensors", tensors, about, backbone.tokenizer, dtype)


def begin(
    path: Path,
    resnet: Path,
    captions: Iterable[str],
    *,
    glove: Path | None = None,
    pool: str = "gem",
    config: WordConfig | None = None,
    dim: int = 512,
    seed: int = 0,
) -> None:
    """Writes the directory of a backbone that training begins with: torchvision's ResNet of the
    file `resnet` (50 layers; 152 on CIRR), the words of `captions`, the rest at random.

    glove: vectors of words, as text (glove.840B.300d.txt); words that are not there, and all where
    there is none, have random ones. pool: "mean" = the ResNet gives features, as on CIRR. config:
    of the words, None = the release's; their number is that of the captions'. Raises WeightsError.
    """
    words = vocabulary.build(captions)
    text = dataclasses.replace(config or WordConfig(), vocab_size=len(words))
    found = torch_files.read(Path(resnet))
    trunk = {f"{CNN}.{name}": found[name] for name in found if not name.startswith("fc.")}
    made = ArtemisConfig(text, _trunk(trunk, str(resnet), pool), dim)
    table = convert.Names()
    _trunk_names(table, made.vision, f"{CNN}.")
    vision = convert.to_ours(trunk, table, ignore=IGNORE, what=str(resnet), dtype=np.float32)
    tokenizer = vocabulary.tokenizer(words, "captions")
    backbone = Backbone(Artemis(made), tokenizer, images.artemis(), "begin")
    given = Path(glove) if glove else None
    vectors = dict(vocabulary.vectors(given, words, text.hidden_size) if given else ())
    params = jax.device_get(jax.jit(backbone.init)(jax.random.key(seed)))
    convert.check_shapes(vision["vision"], params["vision"], str(resnet))
    table = params["text"]["embed"]["embedding"].copy()
    for row, vector in vectors.items():
        table[row] = vector
    params["text"]["embed"]["embedding"] = table
    write(path, backbone, params | vision, np.float32)


def names(config: ArtemisConfig) -> convert.Names:
    """Name table of both encoders."""
    table = convert.Names()
    _trunk_names(table, config.vision, f"{CNN}.")
    table.linear(HEADS[config.vision.pool], "visual_projection")
    table["txt_enc.embed.weight"] = (("text", "embed", "embedding"), "same")
    lstm = config.text.recurrent == "lstm"
    recurrent = "txt_enc.sent_enc.0" if lstm else "txt_enc.sent_enc"
    for way, suffix in (("ahead", ""),) if lstm else (("ahead", ""), ("back", "_reverse")):
        for theirs, ours in (("ih", ("input", "{}")), ("hh", ("state_{}",))):
            for leaf, own, layout in (("weight", "kernel", "linear"), ("bias", "bias", "same")):
                target = ("text", way, *(part.format(own) for part in ours))
                table[f"{recurrent}.{leaf}_{theirs}_l0{suffix}"] = (target, layout)
    if lstm:
        table.linear("txt_enc.sent_enc.2", "text", "projection")
    return table


def _trunk_names(table: convert.Names, config: ResNetConfig, prefix: str) -> None:
    table[f"{prefix}conv1.weight"] = (("vision", "conv1", "kernel"), "conv")
    table.batch_norm(f"{prefix}bn1", "vision", "norm1")
    for stage, count in enumerate(config.layers, 1):
        for i in range(count):
            theirs, ours = f"{prefix}layer{stage}.{i}", ("vision", f"stage{stage}_{i}")
            for layer in range(1, 4 if config.bottleneck else 3):
                table[f"{theirs}.conv{layer}.weight"] = ((*ours, f"conv{layer}", "kernel"), "conv")
                table.batch_norm(f"{theirs}.bn{layer}", *ours, f"norm{layer}")
            if not i and (stage > 1 or config.bottleneck):
                shortcut = (*ours, "shortcut_conv", "kernel")
                table[f"{theirs}.downsample.0.weight"] = (shortcut, "conv")
                table.batch_norm(f"{theirs}.downsample.1", *ours, "shortcut_norm")


def to_tensors(params: Mapping[str, Any], config: ArtemisConfig) -> dict[str, np.ndarray]:
    """Both encoders under the names of a checkpoint, the trunk of CIRR's included."""
    return convert.to_source(jax.tree.map(to_host, params), names(config))


def read_networks(
    path: Path, encoders: Any, backbone: Backbone
) -> tuple[dict[str, np.ndarray], str]:
    """What of a checkpoint is on top of the encoders, and its model_version.

    encoders: parameters of `backbone`, which have to be the checkpoint's own: the networks were
    trained with them. Raises WeightsError when they are not, or the file is none of train.py.
    """
    tensors = official.read(path, "model", ignore=PARTS)
    args = torch_files.read_values(path, "args")
    if not isinstance(version := args.get("model_version"), str):
        raise WeightsError(
            f"{path}: no model_version in its args, which says what its score is. Expected a "
            "checkpoint as ARTEMIS' train.py writes it."
        )
    expected = to_tensors(encoders, backbone.config)
    own = {name for name in tensors if name.startswith((IMAGE, TEXT)) and not _ignored(name)}
    wrong = [
        name
        for name in sorted(own)
        if name not in expected or not np.array_equal(np.float32(tensors[name]), expected[name])
    ]
    stored = backbone.config.vision.pool == "mean"
    wrong += [
        name for name in expected if name not in own and not (stored and name.startswith(CNN))
    ]
    if wrong:
        raise WeightsError(
            f"{path}: its encoders are not those of the backbone {backbone.weights_id} "
            f"({len(wrong)} tensors, {wrong[0]} first), and its networks were trained with them. "
            f"Set --config.backbone={path}."
        )
    return {n: tensors[n] for n in tensors if not n.startswith((IMAGE, TEXT))}, version


def write_checkpoint(
    path: Path,
    encoders: Any,
    backbone: Backbone,
    networks: Mapping[str, np.ndarray],
    version: str,
) -> None:
    """{args, epoch, best_score, model, optimizer} for ARTEMIS' evaluate.py and train.py, which
    starts with a fresh AdamW; beside FILE.pth the words, FILE_vocab.pkl."""
    config = backbone.config
    tensors = {**to_tensors(encoders, config), **networks}
    stored = config.vision.pool == "mean"
    depth = 2 + sum(config.vision.layers) * (3 if config.vision.bottleneck else 2)
    if stored:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(CNN)}
    parameters = sum(not name.rpartition(".")[2].startswith("running_") for name in tensors)
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
        for name in tensors
        if name.endswith("running_mean")
    }
    path = Path(path)
    args = argparse.Namespace(
        data_name=path.stem,
        model_version=version,
        embed_dim=config.projection_dim,
        cnn_type=f"resnet{depth}",
        load_image_feature=config.vision.hidden_size if stored else 0,
        txt_enc_type=config.text.recurrent,
        lstm_hidden_dim=config.text.state_size if config.text.recurrent == "lstm" else 1024,
        word_dim=config.text.hidden_size,
        learn_temperature=True,
    )
    group = {
        "lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False,
        "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
        "fused": None, "params": list(range(parameters)),
    }  # fmt: skip
    content = {
        "args": args,
        "epoch": 0,
        "best_score": {"val": None},
        "model": tensors | counters,
        "optimizer": {"state": {}, "param_groups": [group]},
    }
    official.write(path, content)
    vocabulary.write(path.with_name(f"{path.stem}_vocab.pkl"), backbone.tokenizer.words)


def _ignored(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in IGNORE)


def _encoders(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: tensors[name] for name in tensors if name.startswith((IMAGE, TEXT))}


def _with_trunk(tensors: dict[str, Any], source: files.Source) -> dict[str, Any]:
    """With the ResNet of stored features, where the image branch is on top of them."""
    if any(name.startswith(CNN) for name in tensors):
        return tensors
    found = sorted(source.directory.glob("resnet*.pth"))
    if len(found) != 1:
        raise WeightsError(
            f"{source.what()}: its image branch reads features of torchvision's ResNet-152, and "
            f"beside it {'are ' + ', '.join(f.name for f in found) if found else 'is none'}. Put "
            "one resnet152-*.pth (download.pytorch.org/models) into its directory."
        )
    trunk = torch_files.read(found[0])
    kept = {f"{CNN}.{name}": trunk[name] for name in trunk if not name.startswith("fc.")}
    return tensors | kept


def _config(tensors: Mapping[str, np.ndarray], what: str) -> ArtemisConfig:
    """Sizes, read off the tensors of both encoders."""

    def rows(name: str, axis: int = 0) -> int:
        return _rows(tensors, name, what, axis)

    lstm = "txt_enc.sent_enc.0.weight_ih_l0" in tensors
    recurrent, state = ("lstm", "0.") if lstm else ("bigru", "")
    pool = "gem" if f"{HEADS['gem']}.weight" in tensors else "mean"
    text = WordConfig(
        vocab_size=rows("txt_enc.embed.weight"),
        hidden_size=rows("txt_enc.embed.weight", 1),
        recurrent=recurrent,
        state_size=rows(f"txt_enc.sent_enc.{state}weight_ih_l0") // RECURRENT[recurrent],
        max_position_embeddings=vocabulary.CONTEXT_LENGTH,
        eos_token_id=vocabulary.SPECIAL.index("<end>"),
    )
    return ArtemisConfig(text, _trunk(tensors, what, pool), rows(f"{HEADS[pool]}.weight"))


def _trunk(tensors: Mapping[str, np.ndarray], what: str, pool: str) -> ResNetConfig:
    blocks = [
        {m[1] for name in tensors if (m := re.match(rf"{CNN}\.layer{stage}\.(\d+)\.", name))}
        for stage in range(1, 5)
    ]
    bottleneck = f"{CNN}.layer1.0.conv3.weight" in tensors
    width = _rows(tensors, f"{CNN}.conv1.weight", what)
    return ResNetConfig(tuple(map(len, blocks)), bottleneck, width, pool, image_size=224)


def _rows(tensors: Mapping[str, np.ndarray], name: str, what: str, axis: int = 0) -> int:
    if name not in tensors or tensors[name].ndim <= axis:
        raise WeightsError(f"{what}: no tensor {name}, or of another shape than ARTEMIS'.")
    return tensors[name].shape[axis]


def _tokenizer(source: files.Source, config: ArtemisConfig) -> Tokenizer:
    """From the vocabulary beside a checkpoint. Raises WeightsError when it is not the right one."""
    name = torch_files.read_values(source.file, "args").get("data_name")
    found = sorted(source.directory.glob("*_vocab.pkl"))
    if isinstance(name, str):
        found = [file for file in found if file.name == f"{name}_vocab.pkl"]
    if len(found) != 1:
        wanted = f"{name}_vocab.pkl" if isinstance(name, str) else "one *_vocab.pkl"
        raise WeightsError(
            f"{source.what()}: expected {wanted} beside it, where the ids of its words are; there "
            f"{'are ' + ', '.join(f.name for f in found) if found else 'is none'}. Copy it from "
            "the vocab directory of its training (vocab.py makes it)."
        )
    words = vocabulary.read(found[0])
    if len(words) != config.text.vocab_size:
        raise WeightsError(
            f"{found[0]}: {len(words)} words, but {source.what()} has embeddings of "
            f"{config.text.vocab_size}: the vocabulary of another dataset, or of another version "
            "of its captions. Give the one that the model was trained with."
        )
    return vocabulary.tokenizer(words, str(found[0]))
