"""From caption triplets to pairs of images: tar files in the layout of `data/image_triplets`.

A block of triplets is one tar file, whole or not there, so an interrupted run goes on where it was,
and any number of processes makes the same files: process i of n draws the blocks i, i + n, ...
All that is drawn is a function of the seed, the triplet's number and the sample's.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cir_jax.errors import ConfigError
from cir_jax.progress import Progress
from cir_jax.storage.atomic import write_atomically
from data.sharing import Shard, alone, same_run
from data.synthtriplets.triplets import CaptionTriplets

BLOCK = 128
"""Triplets of a tar file: what a kill costs at most."""

SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg"}


class Painter(Protocol):
    """identity: what the images depend on, beside captions and streams."""

    identity: dict[str, Any]

    def pair(self, reference: str, target: str, name: str) -> tuple[list[bytes], dict] | str:
        """Encoded images of two captions, all that is random from the stream `name`, and what to
        note about them; or why there are none, in one word."""
        ...


def draw(
    triplets: CaptionTriplets,
    output: Path,
    painter: Painter,
    *,
    samples: int = 1,
    seed: int = 0,
    shard: Shard | None = None,
) -> dict[str, int]:
    """Writes this shard's `pairs-NUMBER.tar` into `output`; returns how many of what.

    samples: pairs of each triplet. Raises DataError when `output` is of other triplets or settings,
    or another process works on the same shard.
    """
    shard = shard or Shard()
    if samples < 1:
        raise ConfigError(f"--samples={samples}: expected 1 or more.")
    output.mkdir(parents=True, exist_ok=True)
    settings = {"triplets": triplets.identity, "samples": samples, "seed": seed, "block": BLOCK}
    same_run(output, settings | painter.identity, "other captions or settings", "--output")
    counted: Counter[str] = Counter(pairs=0)
    with alone(output / f".lock-{shard.index:05d}-of-{shard.count:05d}"):
        blocks = triplets.blocks(BLOCK, shard.index, shard.count)
        for number, block in Progress(blocks, desc="blocks", unit="block", delay=1):
            file, note = output / f"pairs-{number:06d}.tar", output / f"pairs-{number:06d}.json"
            if not (file.is_file() and note.is_file()):
                made: Counter[str] = Counter(pairs=0)
                samples_of = [(triplet, i) for triplet in block for i in range(samples)]
                members: list[tuple[str, bytes]] = []
                for triplet, i in samples_of:
                    name = f"{seed}/{triplet.number}/{i}"
                    pair = painter.pair(triplet.reference_caption, triplet.target_caption, name)
                    if isinstance(pair, str):
                        made[pair] += 1
                        continue
                    made["pairs"] += 1
                    members += sample(
                        f"{triplet.number:09d}-{i}", *pair, triplet.record | {"sample": i}
                    )
                write_json(note, made)
                write_tar(file, members)
            counted.update(json.loads(note.read_text()))
    return dict(counted)


def sample(
    key: str, images: Iterable[bytes], note: Mapping[str, Any], record: Mapping[str, Any]
) -> list[tuple[str, bytes]]:
    """The files of a pair: KEY.reference.png, KEY.target.png (or .jpg), KEY.json."""
    members = []
    for name, data in zip(("reference", "target"), images, strict=True):
        suffix = next(s for start, s in SUFFIXES.items() if data.startswith(start))
        members.append((f"{key}.{name}.{suffix}", data))
    text = json.dumps({**record, **note}, ensure_ascii=False)
    return [*members, (f"{key}.json", text.encode())]


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar file of (name, content), whole or not there; the same bytes whoever writes it when."""

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    write_atomically(path, write)


def painter(model: str | None) -> Painter:
    """The embedded world's, called "shapes", or a Stable Diffusion. Raises ConfigError."""
    if not model:
        raise ConfigError(
            "--step=draw needs --model: a directory or hub id of a Stable Diffusion as diffusers "
            "saves it, or shapes for the embedded world's renderer."
        )
    if model == "shapes":
        from data.shapes.painter import Painter as Renderer

        return Renderer()
    from data.synthtriplets.stable_diffusion import StableDiffusion

    return StableDiffusion(model)
