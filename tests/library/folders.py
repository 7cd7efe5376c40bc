"""Folders of photos for tests."""

import numpy as np

from tests import tiny as factory


def fill(folder, count, seed=0, name="{i:02}.png"):
    """As many small random photos, every other one in the folder "2024"."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / ("2024" if i % 2 else ".") / name.format(i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(factory.png(rng))
    return folder
