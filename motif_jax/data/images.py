"""Image files into arrays, and pictures of one size out of pictures of any."""

import os

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

_PIXELS_AT_ONCE = 2**20  # in 16 bits, a large picture would take several times its memory


class MediaError(ValueError):
    """A file without a usable clip or picture. `kind` is the reason in two words, for counting; the message adds the numbers."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def on_white(rgba: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """The picture laid on white; alpha is not premultiplied."""
    picture = np.empty((*rgba.shape[:2], 3), np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // rgba.shape[1])
    for top in range(0, len(rgba), rows):
        rgb, alpha = np.split(rgba[top : top + rows].astype(np.uint16), [3], axis=-1)
        picture[top : top + rows] = (rgb * alpha + 255 * (255 - alpha) + 127) // 255
    return picture


def cover(picture: UInt8[np.ndarray, "h w 3"], height: int, width: int, aspect: float = 1.0) -> UInt8[np.ndarray, "H W 3"]:
    """Scaled until it covers H x W, the rest cut off evenly on both sides; bicubic, antialiased when shrinking.

    `aspect` is the width of one source pixel over its height.
    """
    rows, columns = picture.shape[:2]
    if (rows, columns, aspect) == (height, width, 1.0):
        return picture
    want = width / height / aspect  # width over height of the part that is kept, in source pixels
    keep_w, keep_h = min(columns, rows * want), min(rows, columns / want)
    left, top = (columns - keep_w) / 2, (rows - keep_h) / 2
    box = (left, top, left + keep_w, top + keep_h)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box))


def rgb(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of one of Pillow's images, upright, transparent parts on white; an array as it is.

    Raises ValueError for an array that is not uint8 [h, w, 3].
    """
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image must be one of Pillow's, or uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits of grey, which Pillow would clip instead of scale
        image = Image.fromarray(_to_8_bits(np.asarray(image, np.float64), image.mode))
    return on_white(np.asarray(image.convert("RGBA")))


def read_image(path: str | os.PathLike, height: int | None = None, width: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """RGB of an image file, upright, transparent parts on white; covered to height x width when both are given.

    Raises MediaError when the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            picture = rgb(image)
    except FileNotFoundError as error:
        raise MediaError("missing file") from error
    except Image.DecompressionBombError as error:
        raise MediaError("too large", f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first") from error
    except Exception as error:  # Pillow's readers share no class of errors for damaged files
        raise MediaError("is no image", str(error)) from error
    return picture if height is None or width is None else cover(picture, height, width)


def _to_8_bits(grey: Float[np.ndarray, "h w"], mode: str) -> UInt8[np.ndarray, "h w"]:
    """Grey values of Pillow's mode I;16, I or F: 16 bits are scaled by 1/257, and wider numbers by the smallest usual range they fit in.

    Floating point up to 2 is taken for 0..1 with some overshoot, as resampling leaves it, and what exceeds 1 is white.
    """
    largest = grey.max(initial=0)
    if not (grey.min(initial=0) >= 0 and largest <= 65535):
        raise ValueError("grey values beyond 16 bits")
    scale = 1 / 257 if mode.startswith("I;16") or largest > 255 else 255 if mode == "F" and largest <= 2 else 1
    return (grey * scale).round().clip(max=255).astype(np.uint8)
