"""Draws the dummy data of the benchmarks: `python -m data.dummy` rewrites `data/*/dummy/`.

The same files, folders and fields as the authors' downloads, with a handful of scenes of the
embedded world and our own texts. For tests and for trying the commands: numbers mean nothing.
"""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cir_jax.evaluation import circus as circus_text
from data.shapes import benchmarks, render, scene
from data.shapes.benchmarks import BenchmarkSizes

HERE = Path(__file__).parent
SIDE = 32  # pixels
COCO_FIRST = 1001  # ids of COCO images


class Folder:
    """A dataset's folder, and scenes to fill it with."""

    def __init__(self, name: str):
        self.root = HERE / name / "dummy"
        shutil.rmtree(self.root, ignore_errors=True)
        world = benchmarks.world("val", BenchmarkSizes(4, 4, 8, 4))
        self.scenes: Iterator[scene.Scene] = iter(world.gallery)

    def image(self, path: str) -> None:
        """Draws the next scene; the suffix says how it is encoded."""
        picture = Image.fromarray(render.render(next(self.scenes)))
        file = self._path(path)
        picture.resize((SIDE, SIDE), Image.Resampling.BOX).save(file, quality=70)

    def json(self, path: str, content: Any) -> None:
        self._path(path).write_text(json.dumps(content, indent=1) + "\n")

    def lines(self, path: str, entries: Sequence[Any]) -> None:
        self.text(path, "".join(f"{json.dumps(entry)}\n" for entry in entries))

    def text(self, path: str, content: str) -> None:
        self._path(path).write_text(content)

    def array(self, path: str, values: Sequence[int]) -> None:
        np.save(self._path(path), np.asarray(values))

    def _path(self, path: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def circo() -> None:
    """Eight images, three labelled queries (two with several answers), two without labels."""
    folder, ids = Folder("circo"), [17, 4, 250, 33, 8, 91, 120, 66]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": SIDE, "height": SIDE} for i in ids]
    for image in images:
        folder.image(f"COCO2017_unlabeled/unlabeled2017/{image['file_name']}")
    info = {"info": {"description": "dummy data of cir_jax"}, "images": images}
    folder.json("COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", info)
    texts = ["has two stars instead", "is on a white background", "shows no ring at all"]
    answers = [(4, 250, 33), (8,), (91, 17)]
    aspects = [["cardinality", "addition"], ["compare_change"], ["negation"]]
    references = [17, 33, 120]
    val = [
        {
            "reference_img_id": references[i],
            "target_img_id": answers[i][0],
            "relative_caption": texts[i],
            "shared_concept": "a few plain shapes",
            "gt_img_ids": list(answers[i]),
            "id": i,
            "semantic_aspects": aspects[i],
        }
        for i in range(3)
    ]
    hidden = ("target_img_id", "gt_img_ids", "semantic_aspects")
    test = [{k: v for k, v in entry.items() if k not in hidden} for entry in val[:2]]
    folder.json("annotations/val.json", val)
    folder.json("annotations/test.json", test)


def cirr() -> None:
    """Eight images per split in the nested layout; two queries each, with sets of six."""
    folder = Folder("cirr")
    for number, (split, place) in enumerate(
        (("train", "train/7/train"), ("val", "dev/dev"), ("test1", "test1/test1"))
    ):
        prefix = place.rpartition("/")[2]
        names = [f"{prefix}-{i}-{i % 2}-img{i % 2}" for i in range(8)]
        paths = {name: f"./{place.rpartition('/')[0]}/{name}.png" for name in names}
        for path in paths.values():
            folder.image(path)
        entries = []
        for i, text in enumerate(("make the star bigger", "have only one shape, but in blue")):
            members = names[i : i + 6]
            entry = {
                "pairid": 10 * number + 3 * i,
                "reference": members[1],
                "target_hard": members[4],
                "target_soft": {members[4]: 1.0, members[2]: -1.0},
                "caption": text,
                "img_set": {"id": i, "members": members, "reference_rank": 1, "target_rank": 4},
            }
            if split == "test1":
                del entry["target_hard"], entry["target_soft"], entry["img_set"]["target_rank"]
            entries.append(entry)
        folder.json(f"cirr/captions/cap.rc2.{split}.json", entries)
        folder.json(f"cirr/image_splits/split.rc2.{split}.json", paths)


def fashioniq() -> None:
    """Three images per category and split, two queries; one image is in two categories."""
    folder, texts = Folder("fashioniq"), (["is darker.", "has dots? "], ["is round", "and green"])
    for split, letter in (("train", "T"), ("val", "V"), ("test", "E")):
        both = f"B0{letter}BOTH001"
        folder.image(f"images/{both}.png")  # the others are .jpg
        for category in ("dress", "shirt", "toptee"):
            names = [f"B0{letter}{category[:1].upper()}{i:06d}" for i in range(3)]
            for name in names:
                folder.image(f"images/{name}.jpg")
            listed = names if category == "dress" else [*names, both]
            entries = [
                {"target": listed[-1], "candidate": names[0], "captions": texts[0]},
                {"target": names[1], "candidate": listed[-1], "captions": texts[1]},
            ]
            if split == "test":
                entries = [{k: v for k, v in e.items() if k != "target"} for e in entries]
            folder.json(f"captions/cap.{category}.{split}.json", entries)
            folder.json(f"image_splits/split.{category}.{split}.json", listed)


def genecis() -> None:
    """Two queries per task with four candidates; attribute images are boxes of larger ones."""
    folder = Folder("genecis")
    coco, genome = range(139, 145), range(1, 7)
    for number in coco:
        folder.image(f"val2017/{number:012d}.jpg")
    for number in genome:
        folder.image(f"VG_100K_all/{number}.jpg")

    def whole(number: int) -> dict[str, Any]:
        return {"val_image_id": number}

    def part(number: int) -> dict[str, Any]:
        return {"image_id": number, "instance_bbox": [2 * number, 9, 10, 14]}

    words = {
        "focus_attribute": ("color", "size"),
        "change_attribute": ("red", "striped"),
        "focus_object": ("star", "ring"),
        "change_object": ("cross", "moon"),
    }
    for task, conditions in words.items():
        numbers, image = (genome, part) if task.endswith("attribute") else (coco, whole)
        first = numbers[0]
        entries = [
            {
                "condition": condition,
                "reference": image(first + i),
                "target": image(first + i + 1),
                "gallery": [image(first + j) for j in range(6) if j not in (i, i + 1)][:3],
            }
            for i, condition in enumerate(conditions)
        ]
        folder.json(f"genecis/{task}.json", entries)


def coco_object() -> None:
    """Five images: polygons, one in two parts, run lengths, one without a suitable object."""
    folder = Folder("coco_object")
    numbers = range(COCO_FIRST, COCO_FIRST + 5)
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": SIDE, "height": SIDE} for i in numbers
    ]
    for image in images:
        folder.image(f"val2017/{image['file_name']}")
    triangle = [[4.0, 4.0, 14.0, 4.0, 4.0, 14.0]]
    parts = [*triangle, [20.5, 20.0, 25.0, 20.0, 25.0, 25.5, 20.5, 25.5]]
    square = {"size": [SIDE, SIDE], "counts": [SIDE * 8 + 8, 8, 24, 8, 24, 8, 24, 8, 24, 8]}
    square["counts"].append(SIDE * SIDE - sum(square["counts"]))
    whole = [[0.0, 0.0, 32.0, 0.0, 32.0, 32.0, 0.0, 32.0]]
    objects = [  # image, class, box, shape, crowd
        (0, 1, [4.0, 4.0, 10.0, 10.0], triangle, 0),
        (0, 2, [20.5, 20.0, 4.5, 5.5], [parts[1]], 0),
        (1, 2, [4.0, 4.0, 21.0, 21.5], parts, 0),
        (2, 3, [8.0, 8.0, 5.0, 8.0], square, 1),
        (2, 1, [4.0, 4.0, 10.0, 10.0], triangle, 0),
        (2, 2, [20.5, 20.0, 4.5, 5.5], [parts[1]], 0),
        (3, 3, [0.0, 0.0, 32.0, 32.0], whole, 0),  # too large
    ]
    annotations = [
        {
            "id": i,
            "image_id": numbers[image],
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "segmentation": shape,
            "iscrowd": crowd,
        }
        for i, (image, category, box, shape, crowd) in enumerate(objects)
    ]
    classes = [{"id": i + 1, "name": n} for i, n in enumerate(("star", "traffic light", "ring"))]
    content = {"images": images, "annotations": annotations, "categories": classes}
    folder.json("annotations/instances_val2017.json", content)


def coco_captions() -> None:
    """Four test images with five or six captions, one image of another split."""
    folder, images, order = Folder("coco_captions"), [], []
    relevant: dict[str, dict[str, list[int]]] = {}
    numbers = range(COCO_FIRST, COCO_FIRST + 5)
    for i, number in enumerate(numbers):
        count, test = 6 if i == 1 else 5, i < 4
        sentences = [
            {"sentid": 100 * i + 7 * j, "imgid": i, "raw": f"Scene {i} in words, take {j}."}
            for j in range(count)
        ]
        name = f"COCO_val2014_{number:012d}.jpg"
        entry = {"filepath": "val2014", "filename": name, "imgid": i, "cocoid": number}
        images.append(entry | {"split": "test" if test else "train", "sentences": sentences})
        if test:
            folder.image(f"val2014/{name}")
            ids = [sentence["sentid"] for sentence in sentences[:5]]
            order = ids + order  # not the order of the other file
            for truth in ("original", "cxc", "eccv"):
                here = {"i2t": {str(number): ids}, "t2i": {str(k): [number] for k in ids}}
                if truth == "cxc" and i == 0:
                    here["i2t"][str(number)] = [*ids, 100]
                    here["t2i"]["0"] = [number, numbers[1]]
                if truth == "eccv" and i > 1:
                    here = {"i2t": {}, "t2i": {}}  # not all are judged
                for direction, pairs in here.items():
                    relevant.setdefault(f"{truth} {direction}", {}).update(pairs)
    folder.json("dataset_coco.json", {"images": images, "dataset": "coco"})
    for key, pairs in relevant.items():
        truth, direction = key.split()
        name = {"i2t": "image_to_caption", "t2i": "caption_to_image"}[direction]
        folder.json(f"eccv_caption/data/{truth}_{name}.json", pairs)
    folder.array("eccv_caption/data/coco_test_ids.npy", order)


def mbeir() -> None:
    """The dummy CIRR and FashionIQ as UniIR's code makes them, and mteb packs them (`pyarrow`)."""
    import pyarrow
    import pyarrow.parquet

    shutil.rmtree(HERE / "mbeir" / "dummy", ignore_errors=True)
    for number, dataset in ((7, "fashioniq"), (8, "cirr")):
        source = HERE / dataset / "dummy"
        files = {file.stem: file for file in sorted(source.rglob("*.[jp][pn]g"))}
        ids = {name: f"{number}:{i + 1}" for i, name in enumerate(sorted(files, reverse=True))}

        def image(name: str, files: dict[str, Path] = files) -> dict[str, Any]:
            data = io.BytesIO()
            Image.open(files[name]).convert("RGB").save(data, "JPEG", quality=70)
            return {"bytes": data.getvalue(), "path": f"{name}.jpg"}

        corpus = [
            {"id": key, "modality": "image", "text": None, "image": image(name)}
            for name, key in ids.items()
        ]
        queries, qrels = [], []
        for i, (reference, text, targets) in enumerate(_mbeir_queries(dataset)):
            key = f"{number}:{i + 1}"
            asked = {"id": key, "modality": "image,text", "text": text, "image": image(reference)}
            queries.append(asked)
            qrels += [
                {"query-id": key, "Q0": "0", "corpus-id": ids[target], "score": 1}
                for target in targets
            ]
        folder = HERE / "mbeir" / "dummy" / dataset
        folder.mkdir(parents=True)
        for name, rows in (("corpus", corpus), ("query", queries), ("qrels", qrels)):
            table = pyarrow.Table.from_pylist(rows)
            # small groups: the files of the hub have many
            pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet", 5)


def _mbeir_queries(dataset: str) -> list[tuple[str, str, list[str]]]:
    """Reference, text and right answers of the val queries; those of one reference and text are
    one."""
    captions, found = HERE / dataset / "dummy", {}
    if dataset == "cirr":
        for entry in json.loads((captions / "cirr/captions/cap.rc2.val.json").read_text()):
            key = entry["reference"], circus_text.sentence([entry["caption"]])
            right = [name for name, grade in entry["target_soft"].items() if grade == 1]
            found.setdefault(key, []).extend(right)
    else:
        for category in ("dress", "shirt", "toptee"):
            for entry in json.loads((captions / f"captions/cap.{category}.val.json").read_text()):
                key = entry["candidate"], circus_text.joined(entry["captions"])
                found.setdefault(key, []).append(entry["target"])
    return [(*key, right) for key, right in found.items()]


def circus() -> None:
    """Every second query of CIRR and FashionIQ, all but one of CIRCO; at most two validated."""
    folder = Folder("circus")
    lists: dict[str, list[dict[str, Any]]] = {"circo": []}
    for entry in json.loads((HERE / "circo/dummy/annotations/val.json").read_text())[1:]:
        place = f"COCO2017_unlabeled/unlabeled2017/{entry['reference_img_id']:012d}.jpg"
        lists["circo"].append(
            {
                "query_id": f"circo_q_test_{entry['id']}",
                "query_text": entry["relative_caption"],
                "query_img_path": f"<path_to_circo_mbeir>/{place}",
                "pos_cand_list": [f"circo_img_{entry['target_img_id']}"],
                "gt_cand_list": [f"circo_img_{i}" for i in entry["gt_img_ids"]],
            }
        )
    for number, dataset in ((7, "fashioniq"), (8, "cirr")):
        lists[dataset] = [
            {
                "qid": f"{number}:{i + 1}",
                "query_txt": text,
                "query_img_path": f"mbeir_images/{dataset}_images/{reference}.jpg",
                "query_modality": "image,text",
                "query_src_content": "{}",
                "pos_cand_list": [],
                "neg_cand_list": [],
                "task_id": 7,
            }
            for i, (reference, text, _) in enumerate(_mbeir_queries(dataset))
        ][1::2]
    for dataset, entries in lists.items():
        stem = "circo_test" if dataset == "circo" else f"mbeir_{dataset}_task7_test"
        free = f"shortcut_free_subsets/{dataset}/shortcut_free"
        folder.lines(f"{free}/mbeir_{dataset}_task7_test_multimodal.jsonl", entries)
        folder.lines(f"{free}/mbeir_{dataset}_task7_test_multimodal.trace.jsonl", [{"any": 1}])
        for part, kept in (("solved", entries[:1]), ("unsolved", entries[1:2])):
            place = f"final_dataset/query_jsonl/{dataset}/validated_{part}"
            folder.lines(f"{place}/{stem}_validated_{part}.jsonl", kept)


def icir() -> None:
    """Two instances with three texts, three images that are in one database each, one in both."""
    folder, database, queries = Folder("icir"), [], []
    for instance, texts in (("star_7", ("in snow", "as a toy")), ("ring_2", ("at night",))):
        for i in range(3):
            text = texts[i % len(texts)] if i < 2 else "other"
            database.append((f"icir/database/{instance}/{i}.jpg", text, instance))
        for i, text in enumerate(texts):
            queries.append((f"icir/query/{instance}/{i // 2}.jpg", text, instance))
    database.append(("icir/database/both.jpg", "in snow", "star_7"))
    database.append(("icir/database/both.jpg", "other", "ring_2"))
    for image in dict.fromkeys(row[0] for row in (*database, *queries)):
        folder.image(image.removeprefix("icir/"))
    for name, rows in (("database", database), ("query", queries)):
        folder.text(f"{name}_files.csv", "".join(",".join(row) + "\n" for row in rows))


if __name__ == "__main__":
    for draw in (circo, cirr, fashioniq, genecis, coco_object, coco_captions, mbeir, circus, icir):
        draw()
