"""The clip record: a dict of named values <-> the bytes of one tf.train.Example, and the TFDS features that describe it.

Arrays are raw little-endian bytes and frames are JPEG or PNG, so a record costs what its bytes cost. Both directions are
written out here (the wire format is three levels deep), which keeps protobuf and TensorFlow out of the input pipeline.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

Values = list[bytes] | list[float] | list[int]

TEXTS = ("clip_id", "video", "caption")
INTEGERS = ("frame_stride", "first_frame")
_PNG_LEVEL = 1  # with one fixed filter: several times faster than the default, about 10 % larger


@dataclass(frozen=True)
class Layout:
    """What a dataset's records hold; one for the whole dataset, part of its manifest."""

    frames: int
    height: int
    width: int
    flow_stride: int
    image_format: str = "jpeg"
    jpeg_quality: int = 90
    motion_mask: bool = False
    pixels: bool = True  # whether the frames themselves are stored
    latent: tuple[int, ...] = ()  # rows, columns and channels of a frame's posterior moments; () when they are not stored
    text: tuple[int, ...] = ()  # length and width of the sentence's embedding, likewise

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the stored flow."""
        return self.height // self.flow_stride, self.width // self.flow_stride

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, type) of the fields stored as raw bytes."""
        fields = {"flow": ((self.frames, *self.grid, 2), "<f2")}
        if self.motion_mask:
            fields["motion_mask"] = ((self.frames, *self.grid), "|u1")
        if self.latent:
            fields["latent_moments"] = ((self.frames, *self.latent), "<f2")
        if self.text:
            fields["text_embedding"] = (tuple(self.text), "<f2")
        return fields

    def batch(self, image: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, type) of what a clip brings into a batch, tokens aside: latents for frames, of which `image` keeps the first."""
        fields = self.arrays() | {"fps": ((), "<f4")}
        if not self.latent:
            fields["frames"] = ((self.frames, self.height, self.width, 3), "|u1")
        elif image:
            fields["image"] = ((self.height, self.width, 3), "|u1")
        return fields

    def names(self) -> tuple[str, ...]:
        """Every field of a record."""
        return (*TEXTS, *INTEGERS, "fps", *(("frames",) if self.pixels else ()), *self.arrays())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Layout":
        """The inverse of `to_dict`, also after a journey through JSON."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def encode_clip(layout: Layout, clip: Mapping[str, Any]) -> bytes:
    """The record of a clip.

    `clip`: clip_id, video, caption str; fps float (of the source), frame_stride, first_frame int; frames uint8 [T,H,W,3]; flow
    [T,h,w,2] in pixels at the clip's size, latent_moments [T,h,w,2C] and text_embedding [L,D], all stored as float16;
    motion_mask uint8 [T,h,w]. The layout says which of them are stored.
    Raises ValueError when an array has another shape than the layout says or is not finite in float16.
    """
    values: dict[str, Values] = {name: [clip[name].encode()] for name in TEXTS}
    values |= {name: [int(clip[name])] for name in INTEGERS}
    values["fps"] = [float(clip["fps"])]
    if layout.pixels:
        frames = np.asarray(clip["frames"])
        if frames.shape != (layout.frames, layout.height, layout.width, 3) or frames.dtype != np.uint8:
            raise ValueError(f"frames {frames.dtype} {frames.shape}: must be uint8 {(layout.frames, layout.height, layout.width, 3)}")
        values["frames"] = [encode_image(frame, layout.image_format, layout.jpeg_quality) for frame in frames]
    for name, (shape, dtype) in layout.arrays().items():
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(clip[name]).astype(dtype)
        if array.shape != shape:
            raise ValueError(f"{name} {array.shape}: must be {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite in float16")
        values[name] = [array.tobytes()]
    return encode_example(values)


def decode_clip(layout: Layout, record: bytes, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The inverse of `encode_clip` (JPEG frames come back as the decoder shows them); only `names` when given, "image" for the first frame.

    Raises ValueError on bytes that are not a record of this layout.
    """
    values = decode_example(record)
    arrays = layout.arrays()
    clip: dict[str, Any] = {}
    try:
        for name in names or layout.names():
            if name == "frames":
                clip[name] = _decode_frames(layout, values[name], layout.frames)
            elif name == "image":
                (clip[name],) = _decode_frames(layout, values["frames"], 1)
            elif name in arrays:
                shape, dtype = arrays[name]
                clip[name] = np.frombuffer(values[name][0], dtype).reshape(shape)
            elif name in TEXTS:
                clip[name] = str(values[name][0], "utf-8")
            else:
                clip[name] = +values[name][0]  # bytes have no sign
    except (KeyError, IndexError) as error:
        raise ValueError(f"record without {error}; it holds {', '.join(sorted(values))}") from error
    except TypeError as error:  # numbers where there should be bytes, or bytes for a number
        raise ValueError(f"record whose {name} is of another type: {error}") from error
    return clip


def _decode_frames(layout: Layout, encoded: list[bytes], count: int) -> UInt8[np.ndarray, "n H W 3"]:
    import cv2

    if len(encoded) != layout.frames:
        raise ValueError(f"record with {len(encoded)} frames, the dataset has {layout.frames}")
    frames = np.empty((count, layout.height, layout.width, 3), np.uint8)
    for frame, data in zip(frames, encoded, strict=False):
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if len(data) else None
        if picture is None or picture.shape != frame.shape:
            raise ValueError(f"record with a frame of {None if picture is None else picture.shape}, the dataset has {frame.shape}")
        frame[:] = picture
    return frames


def encode_image(frame: UInt8[np.ndarray, "H W 3"], image_format: str, jpeg_quality: int = 90) -> bytes:
    """PNG (lossless) or JPEG bytes of an RGB frame."""
    import cv2

    picture = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
    if image_format == "png":
        options = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB]
        ok, data = cv2.imencode(".png", picture, options)
    else:
        ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
    if not ok:
        raise ValueError(f"a frame of {frame.shape} cannot be encoded as {image_format}")
    return data.tobytes()


def tfds_features(layout: Layout) -> Any:
    """The `tfds.features.FeaturesDict` of these records; what features.json is written from."""
    import tensorflow_datasets as tfds

    picture = tfds.features.Image(shape=(layout.height, layout.width, 3), encoding_format=layout.image_format)
    fields = {name: tfds.features.Text() for name in TEXTS}
    fields |= {name: tfds.features.Scalar(np.int64) for name in INTEGERS}
    fields["fps"] = tfds.features.Scalar(np.float32)
    if layout.pixels:
        fields["frames"] = tfds.features.Sequence(picture, length=layout.frames)
    for name, (shape, dtype) in layout.arrays().items():
        # Without encoding="bytes" TFDS would store one protobuf number per value: twice the size, hundreds of times slower.
        fields[name] = tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype).type, encoding="bytes")
    return tfds.features.FeaturesDict(fields)


# Example { Features features = 1; }  Features { map<string, Feature> feature = 1; }
# Feature { oneof: BytesList = 1, FloatList = 2, Int64List = 3 }  each list { repeated value = 1; }


def encode_example(values: Mapping[str, Values]) -> bytes:
    """tf.train.Example bytes, features in the order of their names; bytes, float (stored as float32) or int lists."""
    entries = []
    for name in sorted(values):
        items = values[name]
        if isinstance(items[0], bytes):
            kind, content = 1, b"".join(_field(1, item) for item in items)
        elif isinstance(items[0], float):
            kind, content = 2, _field(1, struct.pack(f"<{len(items)}f", *items))
        else:
            kind, content = 3, _field(1, b"".join(_varint(item) for item in items))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, _field(kind, content))))
    return _field(1, b"".join(entries))


def decode_example(record: bytes) -> dict[str, Values]:
    """Feature name -> list of its values; bytes values are views of `record`. Raises ValueError on a damaged message."""
    values: dict[str, Values] = {}
    try:
        for _, features in _fields(memoryview(record)):
            for _, entry in _fields(features):
                parts = dict(_fields(entry))
                kind, content = (_fields(parts[2]) or [(1, memoryview(b""))])[0]
                items = [item for _, item in _fields(content)]
                if kind == 2:
                    items = [x for item in items for x in struct.unpack(f"<{len(item) // 4}f", item)]
                elif kind == 3:
                    items = [x for item in items for x in _integers(item)]
                values[bytes(parts[1]).decode()] = items
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a tf.train.Example of {len(record)} bytes: {error}") from error
    return values


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take ten bytes, as protobuf's int64 does
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 128:
        return value, at + 1
    value, shift = value & 127, 7
    while True:
        if shift > 63:
            raise IndexError("an integer of more than 64 bits")
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at + 1


def _fields(data: memoryview) -> list[tuple[int, memoryview]]:
    """(number, content) of each field: a view for the length-delimited, packed bytes for unpacked numbers."""
    found, at, end = [], 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        if tag & 7 == 2:
            size, start = _read_varint(data, at)
            at = start + size
        elif tag & 7 == 0:  # an integer that its writer did not pack
            start = at
            _, at = _read_varint(data, at)
        elif tag & 7 == 5:  # a float that its writer did not pack
            start, at = at, at + 4
        else:
            raise IndexError(f"field of wire type {tag & 7}")
        if at > end:
            raise IndexError(f"field of {at - start} bytes with {end - start} left")
        found.append((tag >> 3, data[start:at]))
    return found


def _integers(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _read_varint(data, at)
        yield value - (1 << 64) if value >> 63 else value
