"""Object classes of the embedded world, in place of COCO's, and the words that name them.

    python -m data.shapes.objects data/shapes/objects.json

writes the committed file again.
"""

import json
import sys
from pathlib import Path

from data.shapes import words as w


def objects() -> dict[str, list[str]]:
    """Class -> words that may stand for it in a caption, itself first."""
    return {words[0]: list(dict.fromkeys(words)) for words in w.SHAPE_WORDS}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(objects(), indent=1) + "\n")
