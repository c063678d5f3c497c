"""Pictures of every kind that Pillow opens: each is read as it looks, by closed forms, or refused by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from lightning_baqe.data.pictures import read_image
from lightning_baqe.errors import DataError

ARRAY = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
RGB = Image.fromarray(ARRAY)
RAMP = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, axis=0)
WHITE_IS_ZERO = {262: 0}  # a TIFF's photometric interpretation


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> np.ndarray:
    """What is read of an image that is saved under this name."""
    image.save(folder / name, **options)
    found = read_image(folder / name)
    assert found.mode == "RGB"
    return np.asarray(found)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.ppm", "a.webp"])
def test_rgb_stays_as_it_is(name: str, tmp_path: Path) -> None:
    options = {"lossless": True} if name == "a.webp" else {}
    assert np.array_equal(saved(tmp_path, RGB, name, **options), ARRAY)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_few_bits_show_their_colours(mode: str, suffix: str, tmp_path: Path) -> None:
    image = RGB.convert(mode)
    assert np.array_equal(saved(tmp_path, image, f"a.{suffix}"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_by_their_whole_range(name: str, tmp_path: Path) -> None:
    wanted = np.round(RAMP / 65535 * 255)
    assert np.array_equal(saved(tmp_path, Image.fromarray(RAMP), name), wanted[..., None].repeat(3, axis=2))


def test_white_may_be_zero(tmp_path: Path) -> None:
    """As X-ray pictures have it."""
    wanted = np.round((65535 - RAMP) / 65535 * 255)
    found = saved(tmp_path, Image.fromarray(RAMP), "a.tif", tiffinfo=WHITE_IS_ZERO)
    assert np.array_equal(found[..., 0], wanted)


def test_twelve_bits_are_scaled_by_their_whole_range(tmp_path: Path) -> None:
    packed = bytes.fromhex("".join(f"{value:03x}" for value in (0, 1365, 2730, 4095)))
    (tmp_path / "a.tif").write_bytes(tiff(width=4, height=1, bits=12, data=packed))
    assert np.asarray(read_image(tmp_path / "a.tif"))[..., 0].tolist() == [[0, 85, 170, 255]]


def tiff(width: int, height: int, bits: int, data: bytes) -> bytes:
    """A grey TIFF, written by its specification (revision 6.0, sections 2 and 3)."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    return b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + entries + bytes(4) + data


class TestTransparency:
    """What is transparent shows white, and half of what is half transparent, whatever colour lies under it."""

    ALPHA = np.array([[0, 255, 128]], dtype=np.uint8)

    def test_a_channel(self, tmp_path: Path) -> None:
        colour = np.array([[[255, 0, 0], [10, 20, 30], [0, 0, 0]]], dtype=np.uint8)
        image = Image.fromarray(np.dstack([colour, self.ALPHA]))
        for name in ("a.png", "a.tif", "a.webp"):
            options = {"lossless": True, "exact": True} if name == "a.webp" else {}
            assert saved(tmp_path, image, name, **options).tolist() == [[[255] * 3, [10, 20, 30], [127] * 3]]

    def test_grey(self, tmp_path: Path) -> None:
        image = Image.merge("LA", [Image.new("L", (3, 1), 40), Image.fromarray(self.ALPHA)])
        assert saved(tmp_path, image, "a.png")[0, :, 0].tolist() == [255, 40, 147]

    def test_a_palette(self, tmp_path: Path) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
        image.putdata([0, 1, 2])
        assert saved(tmp_path, image, "a.png", transparency=1).tolist() == [[[200, 0, 0], [255] * 3, [0, 0, 200]]]
        assert saved(tmp_path, image, "b.png", transparency=b"\0\xff\xff").tolist()[0][0] == [255] * 3

    @pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
    def test_one_colour(self, mode: str, key: Any, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[7, 8]], dtype=np.uint8)).convert(mode)
        assert saved(tmp_path, image, "a.png", transparency=key)[0, :, 0].tolist() == [255, 8]

    def test_one_of_sixteen_bits(self, tmp_path: Path) -> None:
        found = saved(tmp_path, Image.fromarray(RAMP), "a.png", transparency=0)
        assert found[0, 0].tolist() == [255] * 3
        assert found[0, 21, 0] == 85


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("kind", ["RGB", "L", "I;16"])
def test_pictures_stand_upright(name: str, kind: str, tmp_path: Path) -> None:
    """Orientation 6: row 0 of what is stored is the right side of the picture, which shows turned clockwise."""
    if kind == "I;16" and name in ("a.jpg", "a.webp"):
        pytest.skip("holds 8 bits")
    array = RAMP if kind == "I;16" else np.asarray(RGB.convert(kind))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    found = saved(tmp_path, Image.fromarray(array), name, exif=exif)
    plain = saved(tmp_path, Image.fromarray(array), f"plain_{name}")
    assert np.abs(found.astype(int) - np.rot90(plain, k=-1)).mean() < 3  # JPEG's blocks differ


def test_cmyk_without_a_profile(tmp_path: Path) -> None:
    found = saved(tmp_path, RGB.convert("CMYK"), "a.jpg", quality=100, subsampling=0)
    assert np.abs(found.astype(int) - ARRAY).mean() < 3


def test_cmyk_with_a_broken_profile(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read the image .*a\.jpg"):
        saved(tmp_path, RGB.convert("CMYK"), "a.jpg", icc_profile=b"nonsense")


def test_lab(tmp_path: Path) -> None:
    """TIFF's third colour space: grey of half the lightness is sRGB 119."""
    found = saved(tmp_path, Image.new("LAB", (4, 4), (128, 128, 128)), "a.tif")
    assert np.abs(found.astype(int) - 119).max() <= 3


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame(name: str, tmp_path: Path) -> None:
    options = {"lossless": True} if name == "a.webp" else {}
    first = RGB.quantize(16).convert("RGB")
    found = saved(tmp_path, first, name, save_all=True, append_images=[first.rotate(90)], **options)
    assert np.array_equal(found, np.asarray(first))


def test_a_name_that_says_another_format(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    RGB.save(buffer, "PNG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.jpg")), ARRAY)


@pytest.mark.parametrize(
    ("dtype", "said"), [(np.float32, "floating-point numbers"), (np.int32, "with a sign")], ids=["float32", "int32"]
)
def test_numbers_without_a_white_are_refused(dtype: type, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"Cannot read the image .*a\.tif .*{said}.*do not say what is white"):
        saved(tmp_path, Image.fromarray(RAMP.astype(dtype)), "a.tif")


def test_several_pages_are_refused_but_not_a_thumbnail(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tif .*2 pages"):
        saved(tmp_path, RGB, "a.tif", save_all=True, append_images=[RGB])
    thumbnail = RGB.resize((6, 4))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    assert np.array_equal(saved(tmp_path, RGB, "b.tif", save_all=True, append_images=[thumbnail]), ARRAY)


def test_a_profile_is_used(tmp_path: Path) -> None:
    """An RGB profile in a CMYK file does not fit: it is read, and refused, rather than ignored."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with pytest.raises(DataError, match=r"Cannot read the image .*a\.jpg"):
        saved(tmp_path, RGB.convert("CMYK"), "a.jpg", icc_profile=profile)
