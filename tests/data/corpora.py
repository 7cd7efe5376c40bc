"""Sources of corpora made for a test, and what the builders read of them."""

import io
import tarfile

from PIL import Image

from data.build import survey
from data.source import Options


def jpeg(shade=0, side=8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (shade % 256, 99, 7)).save(data, "JPEG")
    return data.getvalue()


def records(dataset, source, start=0, decode="build", **options):
    found = survey(dataset, source, Options(decode=decode, **options))
    ((_, splits),) = found.splits.items()
    return list(splits["train"].records(start))


def report(dataset, source, **options):
    return survey(dataset, source, Options(**options)).reports["train"]


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption=b"a fox", image=None):
    return [(f"{key}.jpg", image or jpeg()), (f"{key}.txt", caption)]


# All kinds
