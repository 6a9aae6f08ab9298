"""The record: against protobuf's own reader and writer, against TFDS, and its refusals."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from motif_jax.data import records
from motif_jax.data.records import Layout, decode_clip, encode_clip


@pytest.fixture
def layout() -> Layout:
    return Layout(frames=3, height=16, width=24, flow_stride=8, image_format="png", motion_mask=True)


@pytest.fixture
def clip() -> dict:
    rng = np.random.default_rng(0)
    return {
        "clip_id": "a-0",
        "video": "ä/b.mp4",
        "caption": "a cat \N{CAT} runs",
        "fps": 29.5,
        "frame_stride": 300,
        "first_frame": 2**40,
        "frames": rng.integers(0, 256, (3, 16, 24, 3), np.uint8),
        "flow": rng.normal(0, 30, (3, 2, 3, 2)).astype(np.float32),
        "motion_mask": rng.integers(0, 256, (3, 2, 3), np.uint8),
    }


def test_round_trip(layout, clip):
    back = decode_clip(layout, encode_clip(layout, clip))
    assert set(back) == set(clip)
    for name in clip:
        expected = clip[name].astype(np.float16) if name == "flow" else clip[name]
        np.testing.assert_array_equal(back[name], expected)
    assert back["flow"].dtype == np.float16 and back["frames"].dtype == np.uint8
    assert set(decode_clip(layout, encode_clip(layout, clip), ("flow",))) == {"flow"}


def test_protobuf_reads_it_and_writes_the_same_bytes(layout, clip):
    from tensorflow_datasets.proto import tf_example_pb2

    data = encode_clip(layout, clip)
    example = tf_example_pb2.Example.FromString(data)
    features = example.features.feature
    assert features["caption"].bytes_list.value[0].decode() == clip["caption"]
    assert list(features["fps"].float_list.value) == [29.5]
    assert list(features["first_frame"].int64_list.value) == [2**40]
    assert features["flow"].bytes_list.value[0] == clip["flow"].astype("<f2").tobytes()
    assert len(features["frames"].bytes_list.value) == 3
    assert example.SerializeToString(deterministic=True) == data


def test_reads_what_protobuf_writes():
    """Also negative numbers, empty lists and values that are not packed."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["ints"].int64_list.value.extend([0, 127, 128, -1, -(2**63), 2**63 - 1])
    example.features.feature["floats"].float_list.value.extend([0.5, -2.0, 1e30])
    example.features.feature["bytes"].bytes_list.value.extend([b"", b"x" * 300])
    example.features.feature["none"].bytes_list.SetInParent()
    found = records.decode_example(example.SerializeToString())
    assert found["ints"] == [0, 127, 128, -1, -(2**63), 2**63 - 1]
    assert found["floats"] == [0.5, -2.0, pytest.approx(1e30)]
    assert [bytes(b) for b in found["bytes"]] == [b"", b"x" * 300]
    assert found["none"] == []
    unpacked = bytes([0x0A, 14, 0x0A, 12, 0x0A, 1, ord("i"), 0x12, 7, 0x1A, 5, 0x08, 5, 0x08, 0x96, 1])
    assert tf_example_pb2.Example.FromString(unpacked).features.feature["i"].int64_list.value == [5, 150]
    assert records.decode_example(unpacked)["i"] == [5, 150]


def test_tfds_describes_it(layout, clip):
    found = records.tfds_features(layout).deserialize_example_np(encode_clip(layout, clip))
    assert found["caption"].decode() == clip["caption"]
    assert (found["fps"], found["frame_stride"], found["first_frame"]) == (29.5, 300, 2**40)
    np.testing.assert_array_equal(np.stack(found["frames"]), clip["frames"])
    np.testing.assert_array_equal(found["flow"], clip["flow"].astype(np.float16))
    np.testing.assert_array_equal(found["motion_mask"], clip["motion_mask"])


def test_jpeg_is_close(layout, clip):
    smooth = np.broadcast_to(np.linspace(0, 255, 24).astype(np.uint8)[:, None], (3, 16, 24, 3))
    jpeg = dataclasses.replace(layout, image_format="jpeg", jpeg_quality=95)
    data = encode_clip(jpeg, clip | {"frames": smooth})
    back = decode_clip(jpeg, data, ("frames",))["frames"]
    assert np.abs(back.astype(int) - smooth).mean() < 2
    Image.fromarray(smooth[0]).save(buffer := io.BytesIO(), "JPEG", quality=95)
    stored = Image.open(io.BytesIO(records.decode_example(data)["frames"][0]))
    assert stored.quantization == Image.open(buffer).quantization  # libjpeg's tables of that quality
    colours = np.broadcast_to(np.array([200, 30, 60], np.uint8), (3, 16, 24, 3))
    back = decode_clip(jpeg, encode_clip(jpeg, clip | {"frames": colours}), ("frames",))["frames"]
    assert np.abs(back.astype(int) - colours).max() < 6  # red stays red


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((3, 16, 23, 3), np.uint8)}, r"frames uint8 \(3, 16, 23, 3\)"),
        ({"frames": np.zeros((3, 16, 24, 3), np.float32)}, "frames float32"),
        ({"flow": np.zeros((3, 3, 2, 2))}, r"flow \(3, 3, 2, 2\)"),
        ({"flow": np.full((3, 2, 3, 2), np.nan)}, "not finite"),
        ({"flow": np.full((3, 2, 3, 2), 1e6)}, "not finite"),
    ],
)
def test_refuses(layout, clip, change, message):
    with pytest.raises(ValueError, match=message):
        encode_clip(layout, clip | change)


@pytest.mark.parametrize(("name", "other"), [("caption", 1), ("flow", 1), ("frames", 1), ("fps", b"1"), ("first_frame", b"1")])
def test_a_number_where_bytes_should_be_or_the_reverse(layout, clip, name, other):
    values = records.decode_example(encode_clip(layout, clip))
    values = {k: [bytes(x) if isinstance(x, memoryview) else x for x in v] for k, v in values.items()}
    record = records.encode_example(values | {name: [other] * len(values[name])})
    with pytest.raises(ValueError, match=f"record whose {name} is of another type"):
        decode_clip(layout, record)


def test_damaged_bytes_are_an_error_not_a_clip(layout, clip):
    data = encode_clip(layout, clip)
    for length in (1, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
            decode_clip(layout, data[:length])
    with pytest.raises(ValueError, match="an integer of more than 64 bits"):
        decode_clip(layout, data[:1] + b"\xff" * 100)
    with pytest.raises(ValueError, match="without"):
        decode_clip(layout, b"")
    empty = records.encode_example({"frames": [b""] * 3})
    with pytest.raises(ValueError, match="record with a frame of None"):
        decode_clip(layout, empty, ("frames",))
    with pytest.raises(ValueError, match="record with 3 frames, the dataset has 4"):
        decode_clip(dataclasses.replace(layout, frames=4), data, ("frames",))
