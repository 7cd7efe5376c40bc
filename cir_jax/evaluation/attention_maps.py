"""What the tokens of ISA's sentence attend to, drawn over the images as in the paper's Figure 4."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from cir_jax.errors import ConfigError
from cir_jax.evaluation.contact_sheet import BACKGROUND, FAINT, GAP, INK, MARGIN, TILE, font
from cir_jax.input import images
from cir_jax.retrieval.search import Searcher
from cir_jax.storage.atomic import write_atomically

HOT = np.array((255, 80, 0), np.float32)
COLD = np.array((20, 30, 70), np.float32)
TITLES = {"groups": "spatial groups (1)", "cross": "cross-attention (4)"}


def attention_maps(search: Searcher, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Names of the maps -> float32[images, tokens, height, width]; see `Isa.attention`.

    Raises ConfigError for a method without them, DataError for a file that is no image.
    """
    attend = getattr(search.composer, "attention", None)
    if attend is None:
        raise ConfigError(
            f"{type(search.composer).__name__} has no tokens that attend to an image; ISA has: "
            "--config=experiments/isa.py"
        )
    attend = jax.jit(attend)
    with search.composer.backbone.full_precision():
        found = [attend(search.params, search.frozen, _seen(search, path)[None]) for path in paths]
    if not found[0]:
        raise ConfigError("composer.mapping='mlp' pools the map: there is no attention to draw.")
    names = [name for name in TITLES if name in found[0]]
    return {name: np.concatenate([each[name] for each in found]) for name in names}


def sheet(search: Searcher, paths: Sequence[Path], maps: dict[str, np.ndarray]) -> Image.Image:
    """A row per image and kind of map: the image as the encoder sees it, then each token's map,
    bright where the token attends to most."""
    tokens = next(iter(maps.values())).shape[1]
    width = 2 * MARGIN + (tokens + 1) * (TILE + GAP) - GAP
    row = TILE + 38
    picture = Image.new("RGB", (width, MARGIN + row * len(maps) * len(paths)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    top = MARGIN
    for i, path in enumerate(paths):
        seen = Image.fromarray(_seen(search, path)).resize((TILE, TILE), Image.Resampling.BICUBIC)
        for name, arrays in maps.items():
            picture.paste(seen, (MARGIN, top))
            draw.text((MARGIN, top + TILE + 4), Path(path).name[:20], INK, font(11))
            draw.text((MARGIN, top + TILE + 16), TITLES[name], FAINT, font(11))
            for token, weights in enumerate(arrays[i]):
                left = MARGIN + (token + 1) * (TILE + GAP)
                picture.paste(_over(seen, weights), (left, top))
                draw.text((left, top + TILE + 4), f"u{token + 1}", FAINT, font(11))
            top += row
    return picture


def write(search: Searcher, paths: Sequence[Path], directory: Path) -> list[Path]:
    """attention.png and attention.npz (names, and the maps by their names) in `directory`."""
    maps = attention_maps(search, paths)
    picture = sheet(search, paths, maps)
    names = np.array([str(path) for path in paths])
    drawn, numbers = directory / "attention.png", directory / "attention.npz"
    write_atomically(drawn, lambda file: picture.save(file, format="PNG"))
    write_atomically(numbers, lambda file: np.savez(file, names=names, **maps))
    return [drawn, numbers]


def _seen(search: Searcher, path: Path) -> np.ndarray:
    with images.reading(str(path)):
        return search.composer.backbone.image_transform(images.read(path))


def _over(seen: Image.Image, weights: np.ndarray) -> Image.Image:
    """The image under a map of its own range: dark where it is least, glowing where most."""
    low, high = float(weights.min()), float(weights.max())
    share = (weights - low) / (high - low) if high > low else np.zeros_like(weights)
    grey = Image.fromarray((255 * share).astype(np.uint8))
    mask = np.asarray(grey.resize(seen.size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    colour = mask * HOT + (1 - mask) * COLD
    return Image.fromarray((0.5 * np.asarray(seen, np.float32) + 0.5 * colour).astype(np.uint8))
