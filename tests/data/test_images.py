"""Still pictures: how they are cut to size, read, and refused."""

import numpy as np
import pytest
from PIL import Image

from motif_jax.data.images import MediaError, cover, read_image, rgb


def test_cover_leaves_a_picture_of_the_right_size_alone():
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    np.testing.assert_array_equal(cover(picture, 16, 24), picture)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 64), (64, 20), (7, 5), (40, 40)])
def test_cover_cuts_evenly_and_keeps_proportions(height, width):
    """A ramp in each direction: the middle of the picture stays in the middle, its slope is the scale."""
    rows, columns = 32, 48
    ramp = np.zeros((rows, columns, 3), np.uint8)
    ramp[..., 0] = np.arange(rows)[:, None] * 4 + 60
    ramp[..., 1] = np.arange(columns) * 4 + 20
    out = cover(ramp, height, width).astype(float)
    assert out.shape == (height, width, 3)
    scale = max(height / rows, width / columns)
    middle = out[height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None]
    assert middle[..., 0].mean() == pytest.approx(60 + 4 * (rows - 1) / 2, abs=1)
    assert middle[..., 1].mean() == pytest.approx(20 + 4 * (columns - 1) / 2, abs=1)
    assert np.diff(middle[..., 0], axis=0).mean() == pytest.approx(4 / scale, rel=0.1)
    assert np.diff(middle[..., 1], axis=1).mean() == pytest.approx(4 / scale, rel=0.1)


def test_cover_is_antialiased():
    """One-pixel stripes shrink to grey, not to stripes of another width."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = cover(stripes, 24, 24)[4:-4, 4:-4].astype(int)
    assert np.abs(inner - 127).max() < 12


def test_cover_enlarges_bicubically():
    """A parabola stays one, as cubic convolution has it; between two pixels, straight lines would lie up to 2.3 levels above it."""
    picture = np.repeat(10 * (np.arange(9)[None, :, None] - 4) ** 2, 9, axis=0).repeat(3, axis=-1).astype(np.uint8)
    inner = slice(8, -8)  # whose cubics do not reach over the edge
    wanted = 10 * ((np.arange(36) + 0.5) / 4 - 0.5 - 4)[inner] ** 2
    np.testing.assert_allclose(cover(picture, 36, 36)[inner, inner, 1], np.broadcast_to(wanted, (20, 20)), atol=0.6)


def test_read_image(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)
    assert read_image(tmp_path / "a.png", 16, 16).shape == (16, 16, 3)
    mirrored = picture[:, ::-1]
    turns = ((picture, 0), (mirrored, 0), (picture, 2), (mirrored, 2), (mirrored, 1), (picture, -1), (mirrored, -1), (picture, 1))
    for orientation, (stored, quarters) in enumerate(turns, 1):  # as the standard's table has it: turned after it is mirrored
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(stored, quarters))
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(picture[..., :1], 3, -1))
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), np.repeat(picture[..., :1], 3, -1))
    byte = picture[..., 0]
    for grey in (np.float32(byte) / 255, np.float32(byte), np.int32(byte), np.int32(byte) * 257):
        Image.fromarray(grey).save(tmp_path / "wide.tiff")
        np.testing.assert_array_equal(read_image(tmp_path / "wide.tiff"), np.repeat(picture[..., :1], 3, -1))
    over = np.float32(byte) / 250  # up to 1.02
    Image.fromarray(over).save(tmp_path / "wide.tiff")
    np.testing.assert_array_equal(read_image(tmp_path / "wide.tiff")[..., 0], np.rint(np.minimum(255 * over, 255)))
    rgba = np.concatenate([picture, np.zeros_like(picture[..., :1])], -1)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


def test_pixels_of_a_picture_in_memory():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(rgb(Image.fromarray(picture)), picture)
    assert rgb(picture) is picture
    for wrong in (np.float32(picture), picture[..., 0], np.zeros((20, 30, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[height, width, 3\], not"):
            rgb(wrong)


def test_bad_images(tmp_path):
    with pytest.raises(MediaError, match="missing file"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(MediaError, match="is no image"):
        read_image(tmp_path / "a.png")
    for value in (-1, 70_000, np.nan):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "wide.tiff")
        with pytest.raises(MediaError, match="beyond 16 bits"):
            read_image(tmp_path / "wide.tiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes().replace(b"\x00\x00\x00\rIHDR", b"\x00\x00\x00\x05IHDR"))
    with pytest.raises(MediaError, match="is no image"):
        read_image(tmp_path / "a.png")


def test_an_image_that_is_too_large_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(MediaError, match="too large"):
        read_image(tmp_path / "a.png")
