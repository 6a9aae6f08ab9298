"""The clip record: a dict of named values <-> the bytes of one tf.train.Example, and the TFDS features that describe it.

Arrays are raw little-endian bytes and frames are JPEG or PNG, so a record costs what its bytes cost.
"""

import dataclasses
from collections.abc import Mapping
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


def encode_example(values: Mapping[str, Values]) -> bytes:
    """tf.train.Example bytes, features in the order of their names; bytes, float (stored as float32) or int lists."""
    from tensorflow_datasets.proto import tf_example_pb2

    kinds = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
    example = tf_example_pb2.Example()
    for name, items in values.items():
        getattr(example.features.feature[name], kinds[type(items[0])]).value.extend(items)
    return example.SerializeToString(deterministic=True)


def decode_example(record: bytes) -> dict[str, Values]:
    """Feature name -> list of its values. Raises ValueError on a damaged message."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example of {len(record)} bytes: {error}") from error
    return {name: [*getattr(feature, feature.WhichOneof("kind") or "bytes_list").value] for name, feature in features.items()}
