"""The synthetic world: small coloured shapes on a grey textured background, one of them moving as a sentence says.

In: a world's name, a seed, a split and clip indices. Out: frames, exact optical flow, captions and the exact truth.
Every clip is a function of (world, seed, split, index) alone, whatever batch it is made in; about 3 % of the pixels move.
Coordinates are (x, y) in pixels, and the centre of the pixel in row i and column j is (j, i).
"""

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (226, 38, 38),
    "green": (32, 188, 58),
    "blue": (44, 70, 232),
    "yellow": (240, 216, 32),
    "magenta": (216, 44, 214),
    "cyan": (36, 206, 222),
}
DIRECTIONS = ("left", "right", "up", "down", "still")
UNIT = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)], np.float32)  # (x, y) of each direction; rows grow downwards
STILL = DIRECTIONS.index("still")
# What training never shows: a circle moving left, anything red moving right ... Every word loses one direction at most.
HELD_OUT = {"left": "circle", "right": "red", "up": "square", "down": "blue", "still": "triangle"}
SPLITS = ("train", "validation", "heldout", "several", "backgrounds")
FPS = 8.0

MOVING_SHARE = 0.03  # area of one shape over the area of the frame
_GAP = 0.04  # free space around every shape, over the shorter side
# Half width and half height over the radius R of the circle of the same area; a triangle is centred by its box.
_EXTENT = {"circle": 1.0, "square": np.sqrt(np.pi) / 2, "triangle": np.sqrt(np.pi / 2)}
_LATTICE = 33  # places tried per axis for a bystander; both ends are included, so a free border strip is always found


@dataclass(frozen=True)
class World:
    """What may occur in a clip. `travel` is the way of the named shape over the clip, over the shorter side."""

    colours: tuple[str, ...]
    objects: tuple[int, int]  # fewest and most shapes in a clip
    smoothness: float  # amplitude of a noise octave with c cells per side is c ** -smoothness: 0 is hard, 1 is clouds
    contrast: float  # standard deviation of the background, grey levels
    travel: float = 0.35
    still_share: float = 0.1


WORLDS = {
    # Hard to copy: the plain loss is busy with the background, which makes the effect of the motion focal loss visible.
    "shapes": World(colours=tuple(COLOURS), objects=(1, 3), smoothness=0.0, contrast=28.0),
    # Easy to learn in minutes on a laptop.
    "quickstart": World(colours=tuple(COLOURS), objects=(2, 2), smoothness=1.0, contrast=22.0),
}


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64; arrays wrap around by design."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _text_key(text: str) -> np.ndarray:
    return np.array([zlib.crc32(text.encode())], np.uint64)


def _uniform(key_N: np.ndarray, stream: str, *shape: int) -> np.ndarray:
    """float32 in [0, 1) [N, *shape], a function of each clip's key and the stream's name."""
    counter = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(_mix(key_N ^ _mix(_text_key(stream)))[:, None] + counter)
    return ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(len(key_N), *shape)


def _pick(u_N: np.ndarray, valid_NM: np.ndarray) -> np.ndarray:
    """Index of one True per row, each equally likely."""
    count = np.cumsum(valid_NM, axis=1, dtype=np.int32)
    rank = np.floor(u_N * count[:, -1]).astype(np.int32)
    return np.argmax(count > rank[:, None], axis=1)


def held_out(world: World) -> np.ndarray:
    """Which combinations training never shows: bool [directions, shapes, colours], True where HELD_OUT's word is in."""
    out = np.zeros((len(DIRECTIONS), len(SHAPES), len(world.colours)), bool)
    for direction, word in HELD_OUT.items():
        d = DIRECTIONS.index(direction)
        out[d] = (np.array(SHAPES) == word)[:, None] | (np.array(world.colours) == word)
    return out


def _draw(world: World, key: np.ndarray, split: str) -> dict[str, np.ndarray]:
    """Who is in the clip and what happens: directions first, so that nothing later changes their shares."""
    n, most = len(key), world.objects[1]
    u = _uniform(key, "direction", 2)
    direction = np.where(u[:, 0] < world.still_share, STILL, np.floor(u[:, 1] * STILL).astype(int))

    pairs = np.stack(np.meshgrid(np.arange(len(SHAPES)), np.arange(len(world.colours)), indexing="ij"), -1).reshape(-1, 2)
    unseen = held_out(world)[direction].reshape(n, -1)
    named = pairs[_pick(_uniform(key, "named", 1)[:, 0], unseen if split == "heldout" else ~unseen)]

    # Bystanders: no colour twice, so that the sentence names one object, and never the word held out for the direction:
    # a red shape that stays put in every clip of "moves right" would teach that red ones do not move right.
    shape, colour = np.zeros((n, most), int), np.zeros((n, most), int)
    shape[:, 0], colour[:, 0] = named.T
    u = _uniform(key, "bystanders", most)
    free = ~unseen
    for k in range(1, most):
        free = free & (pairs[:, 1] != colour[:, k - 1, None])
        shape[:, k], colour[:, k] = pairs[_pick(u[:, k], free)].T
    count = world.objects[0] + np.floor(_uniform(key, "count", 1)[:, 0] * (most - world.objects[0] + 1)).astype(int)
    return {"direction": direction, "shape": shape, "colour": colour, "present": np.arange(most) < count[:, None]}


def _place(world: World, key: np.ndarray, drawn: dict[str, np.ndarray], frames: int, height: int, width: int) -> np.ndarray:
    """Centres [N, K, T, 2]: the named path uniform over the frame, bystanders uniform over what its path leaves free."""
    n, most = drawn["shape"].shape
    side, size = min(height, width), np.array([width, height], np.float32)
    half = np.array([_EXTENT[s] for s in SHAPES], np.float32)[drawn["shape"]] * radius(height, width)  # [N, K]
    travel = UNIT[drawn["direction"]] * np.float32(world.travel * side)

    def inside(half_N, travel_N2):
        """Smallest start and extent of the starts that keep a whole path in the frame."""
        low = half_N[:, None] - np.minimum(travel_N2, 0)
        return low, size - 1 - half_N[:, None] - np.maximum(travel_N2, 0) - low

    low, room = inside(half[:, 0], travel)
    if (room < 0).any():
        raise ValueError(f"clips of {height}x{width} have no room for a shape's path; use a less elongated size")
    start = low + _uniform(key, "start", 2) * room
    centre = np.zeros((n, most, frames, 2), np.float32)
    centre[:, 0] = start[:, None] + travel[:, None] * np.linspace(0, 1, frames, dtype=np.float32)[:, None]

    # Boxes that a bystander's box must stay clear of: the one swept by the named shape, then the earlier bystanders.
    box_low = [np.minimum(start, start + travel) - half[:, :1]]
    box_high = [np.maximum(start, start + travel) + half[:, :1]]
    lattice = np.stack(np.meshgrid(*[np.linspace(0, 1, _LATTICE, dtype=np.float32)] * 2), -1).reshape(-1, 2)
    u = _uniform(key, "place", most)
    for k in range(1, most):
        low, room = inside(half[:, k], np.zeros((n, 2), np.float32))
        place = low[:, None] + lattice * room[:, None]
        reach = half[:, k, None, None] + _GAP * side
        clear = np.ones(place.shape[:2], bool)
        for a, b in zip(box_low, box_high, strict=True):
            clear &= ((place + reach < a[:, None]) | (place - reach > b[:, None])).any(-1)
        if not clear.any(1).all():
            raise ValueError(f"clips of {height}x{width} have no room for {most} shapes; use a world with fewer or a less elongated size")
        centre[:, k] = place[np.arange(n), _pick(u[:, k], clear)][:, None]
        box_low.append(centre[:, k, 0] - half[:, k : k + 1])
        box_high.append(centre[:, k, 0] + half[:, k : k + 1])
    return centre


def radius(height: int, width: int) -> float:
    """Radius in pixels of the circle that covers MOVING_SHARE of the frame; every shape has its area."""
    return float(np.sqrt(MOVING_SHARE * height * width / np.pi))


def coverage(shape_N: np.ndarray, centre_N2: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each pixel a shape covers: float32 [N, H, W] in [0, 1], from the distance of the pixel to its outline."""
    x = np.arange(width, dtype=np.float32)[None, None] - centre_N2[:, 0, None, None]
    y = np.arange(height, dtype=np.float32)[None, :, None] - centre_N2[:, 1, None, None]
    out = np.zeros((len(shape_N), height, width), np.float32)
    for s, name in enumerate(SHAPES):
        i = np.flatnonzero(shape_N == s)
        a = np.float32(_EXTENT[name] * radius(height, width))
        if name == "circle":
            distance = np.sqrt(x[i] ** 2 + y[i] ** 2) - a
        elif name == "square":
            distance = np.maximum(np.abs(x[i]), np.abs(y[i])) - a
        else:  # apex up, as wide as high: the sides are 2|x| - y = a
            distance = np.maximum(y[i] - a, (2 * np.abs(x[i]) - y[i] - a) / np.float32(np.sqrt(5)))
        out[i] = np.clip(0.5 - distance, 0, 1)
    return out


def _background(world: World, key: np.ndarray, height: int, width: int) -> np.ndarray:
    """Static grey noise [N, H, W]: octaves of 2, 4, 8 ... cells per shorter side, linearly interpolated, at most 32 or one per pixel."""

    def interpolation(cells, pixels):
        place = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels * cells
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells + 1, dtype=np.float32)))

    side, noise = min(height, width), np.zeros((len(key), height, width), np.float32)
    cells = 2
    while cells <= min(32, side):
        rows, columns = (round(cells * n / side) for n in (height, width))
        values = _uniform(key, f"noise{cells}", rows + 1, columns + 1) - 0.5
        octave = interpolation(rows, height) @ values @ interpolation(columns, width).T
        noise += octave * np.float32(float(cells) ** -world.smoothness) / octave.std(axis=(1, 2), keepdims=True)
        cells *= 2
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    noise *= np.float32(world.contrast) / noise.std(axis=(1, 2), keepdims=True)
    return 128 + noise


def _stripes(world: World, key: np.ndarray, height: int, width: int) -> np.ndarray:
    """Grey stripes [N, H, W] at any angle, 2 to 8 to the shorter side, with the contrast of `_background`."""
    u = _uniform(key, "stripes", 3)
    angle, waves, phase = np.pi * u[:, 0], 2 + 6 * u[:, 1], 2 * np.pi * u[:, 2]
    step = (2 * np.pi * waves / min(height, width))[:, None, None]
    across = np.cos(angle)[:, None, None] * np.arange(width) + np.sin(angle)[:, None, None] * np.arange(height)[:, None]
    return (128 + np.sqrt(2) * world.contrast * np.sin(step * across + phase[:, None, None])).astype(np.float32)


def caption(colour: str, shape: str, direction: str) -> str:
    """The sentence of a clip, such as "the red circle moves left" or "the red circle stays still"."""
    return f"the {colour} {shape} " + ("stays still" if direction == "still" else f"moves {direction}")


def make_clips(world: str, seed: int, indices: Sequence[int], frames: int, height: int, width: int, split: str = "train") -> dict[str, Any]:
    """The clips `indices` of a world, and the truth about them. Object 0 is the one the sentence names; no other moves.

    `train` and `validation` are different clips of the same combinations of words; `heldout` has only combinations that
    training never shows (`HELD_OUT`); `several` always has three shapes; `backgrounds` has
    stripes where training has noise.

    Returns a dict of
      frames uint8 [N,T,H,W,3]; captions list of N str; fps float
      flow float32 [N,T,H,W,2], pixels per frame (u right, v down) from frame l to l+1 on the pixels of which the named
        shape covers at least half in frame l, 0 elsewhere; the last frame repeats the one before
      positions float32 [N,K,T,2], centres of the K objects (the middle of a triangle's box)
      present bool [N,K]; shape, colour int [N,K], indices into SHAPES and WORLDS[world].colours; direction int [N]
      world, height, width as given

    Raises ValueError on an unknown world or split, a negative index, and sizes without room for the shapes.
    """
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; known: {', '.join(WORLDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if min(height, width) < 16 or frames < 2:
        raise ValueError(f"clips of {frames} frames of {height}x{width}: need at least 2 frames of 16x16")
    indices = np.asarray(indices, np.int64).reshape(-1)
    if (indices < 0).any():
        raise ValueError(f"clip index {indices.min()}: must not be negative")
    spec = WORLDS[world]
    if split == "several":
        spec = dataclasses.replace(spec, objects=(3, 3))
    key = _mix(_mix(_text_key(f"{world}/{split}/{seed}")) + indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    drawn = _draw(spec, key, split)
    centre = _place(spec, key, drawn, frames, height, width)
    n, most = drawn["shape"].shape
    palette = np.array([COLOURS[c] for c in spec.colours], np.float32)[drawn["colour"]]  # [N, K, 3]

    background = _stripes if split == "backgrounds" else _background
    scene = np.repeat(background(spec, key, height, width)[..., None], 3, axis=-1)
    for k in range(1, most):
        alpha = (coverage(drawn["shape"][:, k], centre[:, k, 0], height, width) * drawn["present"][:, k, None, None])[..., None]
        scene += alpha * (palette[:, k, None, None] - scene)
    pictures = np.empty((n, frames, height, width, 3), np.uint8)
    flow = np.zeros((n, frames, height, width, 2), np.float32)
    for t in range(frames):
        alpha = coverage(drawn["shape"][:, 0], centre[:, 0, t], height, width)[..., None]
        pictures[:, t] = np.clip(np.rint(scene + alpha * (palette[:, 0, None, None] - scene)), 0, 255)
        if t + 1 < frames:
            flow[:, t] = (alpha >= 0.5) * (centre[:, 0, t + 1] - centre[:, 0, t])[:, None, None]
    flow[:, -1] = flow[:, -2]

    names = [
        (spec.colours[c], SHAPES[s], DIRECTIONS[d])
        for c, s, d in zip(drawn["colour"][:, 0], drawn["shape"][:, 0], drawn["direction"], strict=True)
    ]
    return {
        "frames": pictures,
        "flow": flow,
        "captions": [caption(*name) for name in names],
        "fps": FPS,
        "positions": centre,
        **drawn,
        "world": world,
        "height": height,
        "width": width,
    }


def masks(clips: dict[str, Any]) -> np.ndarray:
    """Pixels that each object covers at least half, bool [N, K, T, H, W], of what `make_clips` returned."""
    n, most, frames, _ = clips["positions"].shape
    height, width = clips["height"], clips["width"]
    flat = coverage(np.repeat(clips["shape"].reshape(-1), frames), clips["positions"].reshape(-1, 2), height, width) >= 0.5
    return flat.reshape(n, most, frames, height, width) & clips["present"][:, :, None, None, None]
