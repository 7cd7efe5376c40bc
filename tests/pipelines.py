"""Tiny random pipelines, written by diffusers itself: Stable Diffusion, InstructPix2Pix, unCLIP."""

import contextlib
import importlib
import io
import json
import os
import string
from pathlib import Path
from typing import Any

import pytest

LENGTH = 16
SIDE = 16
"""Pixels of an image of Stable Diffusion."""


def diffusers() -> Any:
    """The package; without it the test is skipped, but fails where CI is set."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # of networks this small, threads wait for each other
    if os.environ.get("CI"):
        return importlib.import_module("diffusers")
    return pytest.importorskip("diffusers", reason="needs diffusers: pip install 'cir_jax[synth]'")


def stable_diffusion(folder: Path, seed: int = 0) -> Path:
    """Writes one of 16 x 16 images, with the scheduler that Stable Diffusion 1.5 comes with."""
    package = diffusers()
    return _saved(package.StableDiffusionPipeline(**_parts(folder, 4, seed), **_UNCHECKED), folder)


def instruct_pix2pix(folder: Path, seed: int = 0) -> Path:
    """Writes one that reads the latent of the reference, too."""
    kind = diffusers().StableDiffusionInstructPix2PixPipeline
    return _saved(kind(**_parts(folder, 8, seed), **_UNCHECKED), folder)


def karlo(folder: Path, dim: int) -> Path:
    """Writes an unCLIP decoder of image features of that width; images of 32 x 32."""
    package = diffusers()
    import torch
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    kind = package.UnCLIPImageVariationPipeline
    place = kind.__module__.rpartition(".")[0]
    project = importlib.import_module(f"{place}.text_proj").UnCLIPTextProjModel
    down, up = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
    shape = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    super_res = dict(
        sample_size=32, in_channels=6, out_channels=3, down_block_types=down, up_block_types=up,
        attention_head_dim=4, **shape,
    )  # fmt: skip
    decoder = package.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        class_embed_type="identity",
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        **shape,
    )
    learned = package.UnCLIPScheduler(
        variance_type="learned_range", prediction_type="epsilon", num_train_timesteps=1000
    )
    fixed = package.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="epsilon", num_train_timesteps=1000
    )
    tokenizer, config = _texts(folder, width=dim, projection_dim=dim)
    made = kind(
        decoder=decoder,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_proj=project(clip_embeddings_dim=dim, time_embed_dim=32, cross_attention_dim=16),
        **_images(dim),
        super_res_first=package.UNet2DModel(**super_res),
        super_res_last=package.UNet2DModel(**super_res),
        decoder_scheduler=learned,
        super_res_scheduler=fixed,
    )
    _saved(made, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_proj"] = ["unclip", project.__name__]  # as published
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def stable_unclip(folder: Path, dim: int) -> Path:
    """Writes a Stable Diffusion that is conditioned on image features of that width."""
    package = diffusers()
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    parts = _parts(
        folder, 4, 0, class_embed_type="projection", projection_class_embeddings_input_dim=2 * dim
    )
    made = package.StableUnCLIPImg2ImgPipeline(
        **parts,
        **_images(dim),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=dim),
        image_noising_scheduler=package.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    return _saved(made, folder)


_UNCHECKED = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _saved(pipeline: Any, folder: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        pipeline.save_pretrained(folder)
    return folder


def _texts(folder: Path, width: int = 16, **changes: Any) -> tuple[Any, Any]:
    """A tokenizer of letters, and the config of a text encoder."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    tokenizer = CLIPTokenizer(*files, model_max_length=LENGTH)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
        **changes,
    )
    return tokenizer, config


def _parts(folder: Path, channels: int, seed: int, **changes: Any) -> dict[str, Any]:
    package = diffusers()
    import torch
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    unet = package.UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **changes,
    )
    vae = package.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIDE,
        layers_per_block=1,
    )
    tokenizer, config = _texts(folder)
    scheduler = package.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1,
    )  # fmt: skip
    return dict(
        unet=unet, vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer,
        scheduler=scheduler,
    )  # fmt: skip


def _images(dim: int) -> dict[str, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=dim,
    )  # fmt: skip
    return dict(
        feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
        image_encoder=CLIPVisionModelWithProjection(config),
    )
