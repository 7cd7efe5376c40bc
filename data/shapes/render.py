"""Draws scenes: signed distance functions in numpy, antialiased, 64 x 64 RGB.

Arrays see only +, *, min, max and sqrt, which IEEE fixes to the last bit, so that the pixels do not
depend on the machine. There is no pixel noise: a PNG takes about 3 KB.
"""

import math
import struct
import zlib

import numpy as np

from data.shapes.scene import Scene, Thing, sample_scene, stream

SIZE = 64
_RADIUS = (0.16 * SIZE, 0.215 * SIZE)  # in pixels, by size
_CENTRES = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74), (0.5, 0.5))  # x, y
_STRIPE = 6.6  # period in pixels: still two pixels wide when the image is halved
_DOT = 6.8
_PALETTE = np.array(  # as scene.COLOURS: fill, then the lighter tone of stripes and dots
    [
        [[214, 40, 46], [255, 182, 178]],
        [[34, 152, 66], [172, 232, 164]],
        [[42, 92, 224], [176, 208, 255]],
        [[250, 212, 40], [122, 92, 8]],
        [[246, 134, 28], [118, 54, 4]],
        [[138, 54, 188], [226, 188, 250]],
        [[248, 128, 186], [150, 24, 92]],
        [[44, 196, 214], [6, 84, 104]],
    ],
    np.float32,
)
_BACKGROUNDS = np.array(  # as scene.BACKGROUNDS
    [[20, 20, 24], [24, 34, 92], [122, 80, 46], [112, 120, 48], [152, 152, 156], [240, 240, 238]],
    np.float32,
)
_AXIS = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
_CENTRED = (_AXIS / SIZE - np.float32(0.5)) * 2  # -1..1


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.94


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.68) - 0.29


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) * 1.08 + np.abs(y) * 0.68) * 0.7836 - 0.5754


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.866 + (y - 0.08) * 0.5 - 0.5, -(y - 0.08) - 0.72)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.96, np.minimum(x, y) - 0.34)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Two reflections fold the five arms onto the upper one; then one edge is left.
    x = np.abs(x)
    d = np.maximum(0.80902 * x - 0.58779 * y, 0.0)
    x, y = x - 1.61803 * d, y + 1.17557 * d
    d = np.maximum(-0.80902 * x - 0.58779 * y, 0.0)
    x, y = np.abs(x + 1.61803 * d), y + 1.17557 * d
    return (x * 0.6900 + (y - 1.06) * 0.3150) * 1.3184


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), y + 0.1
    lobe = np.sqrt((x - 0.39) * (x - 0.39) + (y - 0.39) * (y - 0.39)) - 0.552
    return np.minimum(lobe, (x + np.abs(y)) * 0.70711 - 0.552)


# As scene.SHAPES. Of coordinates in units of the radius, y upwards; negative inside.
_DISTANCE = (_circle, _square, _triangle, _diamond, _star, _heart, _cross, _ring)


def _place(thing: Thing) -> tuple[slice, slice, np.ndarray, np.ndarray, float]:
    """Returns rows, columns, the thing's own x and y there [h, w], in radii, and the radius."""
    radius = _RADIUS[thing.size]
    cx, cy = _CENTRES[thing.position]
    cx, cy = (cx + thing.dx) * SIZE, (cy + thing.dy) * SIZE
    reach = 1.2 * radius + 2
    columns = slice(max(int(cx - reach), 0), min(int(cx + reach) + 1, SIZE))
    rows = slice(max(int(cy - reach), 0), min(int(cy + reach) + 1, SIZE))
    gx = _AXIS[columns] - np.float32(cx)
    gy = (np.float32(cy) - _AXIS[rows])[:, None]
    cos = np.float32(math.cos(thing.angle) / radius)
    sin = np.float32(math.sin(thing.angle) / radius)
    return rows, columns, cos * gx + sin * gy, cos * gy - sin * gx, radius


def _tone(thing: Thing, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns how much of the second tone shows at each pixel, 0..1."""
    if thing.texture == 1:
        period = _STRIPE / radius
        t = (x + y) * np.float32(0.70711 / period) + 16.25
        wave = np.abs(t - np.floor(t) - 0.5) - 0.25  # distance to the stripe's edge, in periods
        return np.clip(0.5 + wave * np.float32(_STRIPE), 0, 1)
    pitch = np.float32(0.70711 * radius / _DOT)
    u, v = (x + y) * pitch + 16.5, (x - y) * pitch + 16.5
    u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return np.clip(0.5 + (0.31 - np.sqrt(u * u + v * v)) * np.float32(_DOT), 0, 1)


def _paint(canvas: np.ndarray, thing: Thing, light: tuple[float, float]) -> None:
    """Draws the thing onto the canvas [64, 64, 3] float32."""
    rows, columns, x, y, radius = _place(thing)
    distance = _DISTANCE[thing.shape](x, y) * np.float32(radius)
    patch = canvas[rows, columns]
    # A soft dark rim separates blue from navy and white-ish from white.
    patch *= (1 - 0.3 * np.clip(1 - distance * np.float32(0.28), 0, 1))[:, :, None]
    fill, second = _PALETTE[thing.colour]
    if thing.texture:
        paint = fill + _tone(thing, x, y, radius)[:, :, None] * (second - fill)
    else:
        paint = fill
    shade = 1 + 0.06 * thing.tint + (0.1 * light[0]) * x + (0.06 + 0.06 * light[1]) * y
    cover = np.clip(0.5 - distance, 0, 1)[:, :, None]
    patch += cover * (shade.astype(np.float32)[:, :, None] * paint - patch)


def render(scene: Scene) -> np.ndarray:
    """Returns the image of the scene: [64, 64, 3] uint8 RGB."""
    base = _BACKGROUNDS[scene.background] * np.float32(1 + 0.1 * scene.tint)
    slope_x, slope_y = np.float32(0.12 * scene.light[0]), np.float32(-0.1 - 0.06 * scene.light[1])
    gradient = slope_x * _CENTRED + (slope_y * _CENTRED)[:, None]
    canvas = base + gradient[:, :, None] * (base + 24)
    for thing in scene.things:
        _paint(canvas, thing, scene.light)
    return (np.clip(canvas, 0, 255) + np.float32(0.5)).astype(np.uint8)


def object_mask(scene: Scene, index: int) -> np.ndarray:
    """Returns where things[index] is seen (later things hide earlier ones): [64, 64] bool."""
    mask = np.zeros((SIZE, SIZE), bool)
    for i, thing in enumerate(scene.things[index:]):
        rows, columns, x, y, _ = _place(thing)
        inside = _DISTANCE[thing.shape](x, y) < 0
        mask[rows, columns] = inside if i == 0 else mask[rows, columns] & ~inside
    return mask


def encode_png(image: np.ndarray) -> bytes:
    """Returns the PNG file of an image [h, w, 3] uint8.

    One filter (difference to the left neighbour) suits all these images: twice as fast as PIL,
    which tries five of them, and no larger.
    """
    height, width, _ = image.shape
    rows = np.ones((height, 1 + 3 * width), np.uint8)  # first byte of a row: the filter's number
    flat = image.reshape(height, 3 * width)
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 4)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    )


def montage(scenes: list[Scene], columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Returns a contact sheet of the scenes, row by row: [h, w, 3] uint8."""
    rows, cell = -(-len(scenes) // columns), SIZE * scale + gap
    sheet = np.full((rows * cell + gap, columns * cell + gap, 3), 255, np.uint8)
    for i, scene in enumerate(scenes):
        top, left = gap + i // columns * cell, gap + i % columns * cell
        image = render(scene).repeat(scale, 0).repeat(scale, 1)
        sheet[top : top + SIZE * scale, left : left + SIZE * scale] = image
    return sheet


def write_montage(path: str) -> None:
    """Writes the picture of the README: some scenes of `pretrain`'s kind."""
    scenes = [sample_scene(stream("shapes", "montage", i)) for i in range(40)]
    with open(path, "wb") as file:
        file.write(encode_png(montage(scenes, columns=10)))
