"""Picture files as a person sees them, in 8-bit RGB.

| the file holds | what is read |
| --- | --- |
| grey, RGB, palette or one bit, 8 or 16 bit a channel | its colours; the whole range of 16 bits becomes 0..255 |
| transparency, by a channel or by one colour | the picture over :data:`BACKGROUND`, as browsers and printers show it |
| CMYK | sRGB by the file's colour profile; without one, by Pillow's plain formula |
| an orientation (EXIF) | the picture upright |
| an animation | its first frame |
| several pages (TIFF) | refused: nothing says which |
| numbers with a sign, of 32 bits or with fractions | refused: nothing says what is white |
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from lightning_baqe.errors import DataError

BACKGROUND = (255, 255, 255)  # what transparent pixels show, RGB
_SUBFILE, _REDUCED_OR_MASK = 254, 0b101  # the tag of a TIFF page, and its bits: it is no picture of its own
_SIGNED = 2  # sample format of a TIFF; floating-point ones show by their mode
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError, ImageCms.PyCMSError)


def read_image(path: Path) -> Image.Image:
    """The picture at ``path`` in RGB, as the table above says.

    Raises:
        DataError: it is missing, broken, no picture, or one that could be shown in several ways; names the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")  # a pipe has no end
        # Not Image.open(path): Pillow 13 then maps plain TIFFs into memory, and scrambles those that lie on their side.
        with path.open("rb") as file, Image.open(file) as image:
            return _as_seen(image)
    except _UNREADABLE as error:
        raise DataError(f"Cannot read the image {path} ({error}): replace or remove the file.") from error


def _as_seen(image: Image.Image) -> Image.Image:
    """RGB of an opened file; ValueError where it has no one meaning."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
    image.load()
    is_grey = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not is_grey:
        what = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {what}, which do not say what is white; save it with 8 or 16 bits")
    if is_grey:
        image = _eight_bits(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        seen = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert seen is not None  # it is where it is not changed in place
        return seen
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba)
    return image.convert("RGB")


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """ValueError for several pages, or samples that are not unsigned integers."""
    pages = 0
    for page in range(image.n_frames):
        image.seek(page)
        pages += not image.tag_v2.get(_SUBFILE, 0) & _REDUCED_OR_MASK
    image.seek(0)
    if pages > 1:
        raise ValueError(f"it has {pages} pages; save the one that is meant as a file of its own")
    if image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == _SIGNED:
        raise ValueError("its pixels are numbers with a sign, which do not say what is white; save it without")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits as 8, or with a colour that is transparent as 8 and alpha."""
    values, bits = np.asarray(image).astype(np.int64), 16
    alpha = np.where(values == image.info.get("transparency", -1), 0, 255).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is 0, which Pillow leaves so
            values = 2**bits - 1 - values
    white = 2**bits - 1
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    seen = Image.fromarray(grey if alpha.all() else np.stack([grey, alpha], axis=-1))
    seen.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return seen
