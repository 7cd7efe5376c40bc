"""A folder of photos of the embedded world, and queries with their right answers among them.

    python -m data.shapes.photos data/shapes/photos

wrote the folder that comes with the library (`cir search --demo`). Of every query there are five
photos: its reference, a right answer, another photo of the reference, one that breaks a condition
of the query, and one that fits its words but not the reference. Right is, by rule, whatever else in
the folder reaches the goal, too.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from data.shapes.language import statement
from data.shapes.queries import (
    EVAL_PARITY,
    draw_case,
    lookalike,
    narrow_kinds,
    near_miss,
    words_only,
)
from data.shapes.render import encode_png, render
from data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, draw, stream

QUERIES = 40


class Query(NamedTuple):
    """reference, targets: names of photos below the folder."""

    reference: str
    text: str
    targets: frozenset[str]


class Photos(NamedTuple):
    scenes: dict[str, Scene]
    queries: list[Query]


def photos(count: int, world: str = "demo") -> Photos:
    """The photos of so many queries; of another world, others."""
    cases, scenes = [], []
    for i in range(count):
        rng = stream("shapes", "photos", world, i)
        case = draw_case(rng, EVAL_PARITY, narrow_kinds)
        wrong = [lookalike(rng, case), near_miss(rng, case.goal), words_only(rng, case)]
        cases.append((case, statement(rng, case.edits)))
        scenes += [case.reference, case.target, *wrong]
    order = draw(stream("shapes", "photos", world, "order"), range(len(scenes)), len(scenes))
    names = {scene: _name(scene, number) for scene, number in zip(scenes, order, strict=True)}
    queries = [
        Query(
            names[case.reference],
            text,
            frozenset(names[s] for s in scenes if s != case.reference and case.goal.reached_by(s)),
        )
        for case, text in cases
    ]
    return Photos({name: scene for scene, name in names.items()}, queries)


def _name(scene: Scene, number: int) -> str:
    """A folder for each background, a file that says what it shows."""
    said = [
        f"{TEXTURES[thing.texture]}-{COLOURS[thing.colour]}-{SHAPES[thing.shape]}"
        for thing in scene.things
    ]
    return f"{BACKGROUNDS[scene.background]}/{'_'.join(said)}_{number:03d}.png"


def write(folder: Path, made: Photos) -> None:
    for name, scene in made.scenes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(render(scene)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, default=QUERIES, help="five photos for each")
    parser.add_argument("--world", default="demo", help="another name, other photos")
    args = parser.parse_args()
    write(args.folder, photos(args.queries, args.world))


if __name__ == "__main__":
    main()
