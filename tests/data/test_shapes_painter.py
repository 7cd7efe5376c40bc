"""The renderer as a text-to-image model: scenes that their captions are true of."""

import dataclasses

import pytest

from data.shapes import captioned, language, painter
from data.shapes import text_triplets as world
from data.shapes.painter import Painter, read
from data.shapes.scene import QUADRANTS


def scenes(count=120):
    return list(captioned.scenes("captions", "train", count))


def test_a_detailed_caption_becomes_the_scene_it_was_written_of():
    told = 0
    for scene, _ in scenes():
        drawn = read(language.detailed_caption(scene), "x")
        assert drawn.background == scene.background
        of_kind = lambda s: sorted((*t.kind, t.size) for t in s.things)  # noqa: E731
        assert of_kind(drawn) == of_kind(scene)
        if len(scene.things) < 3:  # of three, the caption places the first alone
            assert drawn.content == scene.content
            told += 1
    assert told > 80


def test_every_plain_caption_is_read_and_nothing_else():
    for scene, captions in scenes():
        for caption in captions:
            drawn = read(caption, "x")
            assert (drawn is not None) == world._is_plain(caption), caption
            if drawn is not None:
                assert len({t.position for t in drawn.things}) == len(drawn.things)
                assert len(drawn.things) <= len(scene.things)
    other = ("", "a", "a red", "two star", "a zebra", "on navy", "a star a box a ring a disc")
    for text in (*other, "a white star", "a star on a navy ring", "a star on a red background"):
        assert read(text, "x") is None, text


@pytest.mark.parametrize(
    ("caption", "holds"),
    [
        ("a star above a ring", lambda a, b: a % 2 == b % 2 and a < b),
        ("a star below a ring", lambda a, b: a % 2 == b % 2 and a > b),
        ("a star to the left of a ring", lambda a, b: a // 2 == b // 2 and a < b),
        ("a star to the right of a ring", lambda a, b: a // 2 == b // 2 and a > b),
    ],
)
def test_things_lie_as_they_are_said_to(caption, holds):
    for i in range(20):
        first, second = read(caption, str(i)).things
        assert {first.position, second.position} <= set(QUADRANTS)
        assert holds(first.position, second.position)


def test_what_is_said_of_two_is_said_of_both():
    for i in range(20):
        one, other = read("a picture of two stars with dots on navy", str(i)).things
        assert one.kind == other.kind and one.texture == 2 and one.position != other.position
    places = {read("a star", str(i)).subject.position for i in range(40)}
    assert places == set(range(5))


def test_captions_of_one_stream_differ_in_nothing_but_what_they_say():
    reference = read("a photo of a red star and a ring", "7")
    target = read("a photo of a green star and a ring", "7")
    first = dataclasses.replace(target.things[0], colour=reference.things[0].colour)
    assert target.things[0] != reference.things[0]
    assert dataclasses.replace(target, things=(first, target.things[1])) == reference
    assert read("a photo of a red star and a ring", "8") != reference
    pair, note = Painter().pair("a red star", "a green star", "7")
    assert all(data.startswith(b"\x89PNG") for data in pair) and pair[0] != pair[1] and note == {}
    assert Painter().pair("a red star", "no star", "7") == "unreadable"
    assert painter.Painter.identity == {"model": "shapes"}
