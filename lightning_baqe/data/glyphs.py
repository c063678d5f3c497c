"""Letters and digits drawn with the fonts that matplotlib ships: a harder data set that needs no download."""

import hashlib
import io
import json
import string
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from lightning_baqe.data.base import SPLITS, ImageDataModule, ImageTensorDataset, Split
from lightning_baqe.errors import DataError, check_at_least
from lightning_baqe.files import MIB, cache_folder, read_arrays, read_file, replace_file

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase

# Of matplotlib's 42 fonts, the 21 that draw all 62 characters as letters and digits. Left out: the STIX size and
# non-unicode fonts and the DejaVu display fonts (no such characters), cmex10 and cmsy10 (symbols in their place),
# LastResort (one box for all) and cmmi10 (old-style digits: its 0 is an o). Test fonts are whole typefaces that
# training never sees, not a bold or italic of one that it does: a serif, a sans serif and a typewriter.
TRAIN_FONTS: tuple[str, ...] = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("cmr10", "cmb10", "cmti10"),
)
TEST_FONTS: tuple[str, ...] = (
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmss10", "cmtt10"),
)

_SIDE = 32  # of an image, pixels
_RASTER = 64  # of a glyph before the affine map, pixels
_EM, _BASELINE = 48, 46  # in the raster, pixels: capitals and descenders both fit
_CHUNK = 500  # images drawn at once
_MOST_BYTES = 8192 * MIB
_FORMAT = 1  # raise it when the drawing changes: cached files of another format are not read


class GlyphsDataModule(ImageDataModule):
    """62 classes (0-9, A-Z, a-z) at 3x32x32 under random affine maps, colours, gradients, noise and occlusion.

    Classes are balanced. The test split is drawn with 6 fonts of typefaces that training never sees; validation
    shares the 15 training fonts but draws everything else anew, so its accuracy lies above that of the test split.
    Some pairs differ by size alone (c and C) and a few images cannot be told apart at all: 100 % is out of reach.
    ``mean`` and ``std`` are those of the training split at the default arguments.

    A split is drawn on first use and kept as an ``.npz`` file in ``cache_dir`` under a name that follows from every
    parameter and from the bytes of the fonts.

    Args:
        train_size: training images.
        val_size: validation images.
        test_size: test images.
        batch_size: images per batch.
        seed: of every random draw, and of the order of the training images.
        num_workers: loader processes; the data lies in memory, so 0 is the fastest.
        cache: whether to read and write drawn splits in ``cache_dir``.
        cache_dir: folder of drawn splits; None: :func:`~lightning_baqe.files.cache_folder`.

    Raises:
        ConfigError: an argument out of range.
        DataError: the installed matplotlib lacks one of the fonts (when a split is drawn).
    """

    name = "glyphs"
    mean = (0.5, 0.5, 0.5)
    std = (0.29, 0.29, 0.29)

    def __init__(
        self,
        train_size: int = 8000,
        val_size: int = 2000,
        test_size: int = 10000,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        cache: bool = True,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__((3, _SIDE, _SIDE), batch_size, seed, num_workers)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            check_at_least(f"{split}_size", size, 1)
        self.cache = cache
        self.cache_dir = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()

    @property
    def classes(self) -> tuple[str, ...]:
        """The 62 characters."""
        return tuple(CHARACTERS)

    def prepare_data(self) -> None:
        """Draw the splits that the cache lacks, in one process of each machine."""
        if self.cache:
            for split in SPLITS:
                if not self._cache_file(split).is_file():
                    self._draw(split)

    def make_split(self, split: Split) -> ImageTensorDataset:
        """The images and labels of one split, from the cache or drawn now."""
        cached = _read(self._cache_file(split), self.sizes[split]) if self.cache else None
        images, labels = cached if cached is not None else self._draw(split)
        return ImageTensorDataset(images, labels, self.mean, self.std)

    def _draw(self, split: Split) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * len(SPLITS) + SPLITS.index(split))
        images, labels = draw_glyphs(self.sizes[split], fonts_of(split), generator)
        if self.cache:
            _write(self._cache_file(split), images, labels)
        return images, labels

    def _cache_file(self, split: Split) -> Path:
        fonts = {name: hashlib.sha256(font_path(name).read_bytes()).hexdigest() for name in fonts_of(split)}
        key = json.dumps([_FORMAT, split, self.sizes[split], self.seed, fonts])
        return self.cache_dir / f"glyphs-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def fonts_of(split: Split) -> tuple[str, ...]:
    """Names of the fonts that ``split`` is drawn with."""
    return TEST_FONTS if split == "test" else TRAIN_FONTS


def font_path(name: str) -> Path:
    """The file of one of matplotlib's fonts.

    Raises:
        DataError: matplotlib was installed without it.
    """
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    if not path.is_file():
        raise DataError(
            f"The glyphs data set draws with the font {path}, which the installed matplotlib "
            f"{matplotlib.__version__} lacks: install matplotlib from PyPI, or choose another data set."
        )
    return path


def draw_glyphs(size: int, fonts: tuple[str, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``size`` images of balanced classes.

    Args:
        size: number of images n.
        fonts: names of matplotlib's fonts; each image takes one of them at random.
        generator: of every random draw.

    Returns:
        Images ``(n, 3, 32, 32)`` uint8 and labels ``(n,)`` int64.
    """
    masks = torch.stack([_rasterise(font) for font in fonts])
    labels = torch.randperm(size, generator=generator) % len(CHARACTERS)
    faces = torch.randint(len(fonts), (size,), generator=generator)
    images = torch.empty(size, 3, _SIDE, _SIDE, dtype=torch.uint8)
    for start in range(0, size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk] = _compose(masks[faces[chunk], labels[chunk]], generator)
    return images, labels


def _rasterise(font: str) -> Tensor:
    """Coverage of every character in one font, ``(62, 64, 64)`` uint8; case keeps its size and its baseline."""
    face = ImageFont.truetype(str(font_path(font)), _EM, layout_engine=ImageFont.Layout.BASIC)
    masks = np.zeros((len(CHARACTERS), _RASTER, _RASTER), dtype=np.uint8)
    for mask, character in zip(masks, CHARACTERS, strict=True):
        left, _, right, _ = face.getbbox(character, anchor="ls")
        canvas = Image.new("L", (_RASTER, _RASTER))
        place = (_RASTER / 2 - (left + right) / 2, _BASELINE)
        ImageDraw.Draw(canvas).text(place, character, font=face, fill=255, anchor="ls")
        mask[:] = np.asarray(canvas)
    return torch.from_numpy(masks)


def _compose(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(n, 3, 32, 32)`` uint8 from coverage ``(n, 64, 64)`` uint8: affine map, colours, occlusion, noise."""
    n = len(masks)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    # Where each pixel of the image looks in the raster, both in -1..1: the inverse of rotation x shear x scale.
    angle, shear, zero, one = uniform(-0.3, 0.3), uniform(-0.3, 0.3), torch.zeros(n), torch.ones(n)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    shearing = torch.stack([one, shear, zero, one], 1).view(n, 2, 2)
    linear = torch.linalg.inv(rotation @ shearing @ torch.diag_embed(uniform(0.8, 1.15, 2)))
    grid = affine_grid(torch.cat([linear, uniform(-0.13, 0.13, 2, 1)], 2), [n, 1, _RASTER, _RASTER], False)
    coverage = grid_sample(masks.unsqueeze(1) / 255, grid, align_corners=False)
    coverage = avg_pool2d(coverage, _RASTER // _SIDE)

    # Background: a gradient along a random direction. Ink: the first of some colours that stands out in luminance.
    across = torch.linspace(-1, 1, _SIDE).view(1, 1, 1, _SIDE)
    towards = uniform(0, 2 * torch.pi, 1, 1, 1)
    slope = towards.cos() * across + towards.sin() * across.mT
    background = uniform(0, 1, 3, 1, 1)
    inks = uniform(0, 1, 16, 3)
    luminance = torch.tensor([0.299, 0.587, 0.114])
    contrast = (inks @ luminance - (background.flatten(1) @ luminance).unsqueeze(1)).abs()
    ink = inks[torch.arange(n), (contrast > 0.25).int().argmax(1)].view(n, 3, 1, 1)
    paper = background + uniform(-0.15, 0.15, 3, 1, 1) * slope
    images = paper + coverage * (ink - paper)

    # Occlusion: half of the images lose a rectangle of 3 to 10 pixels a side to a random colour.
    pixels = torch.arange(_SIDE, dtype=torch.float32).view(1, 1, 1, _SIDE)
    left, top = (uniform(2, _SIDE - 10, 1, 1, 1) for _ in range(2))
    width, height = (uniform(3, 10, 1, 1, 1) for _ in range(2))
    hidden = (pixels >= left) & (pixels < left + width)
    hidden = hidden & ((pixels >= top) & (pixels < top + height)).mT & (uniform(0, 1, 1, 1, 1) < 0.5)
    images = torch.where(hidden, uniform(0, 1, 3, 1, 1), images)

    images += torch.randn(images.shape, generator=generator) * uniform(0, 0.12, 1, 1, 1)
    return (images.clamp_(0, 1) * 255).round_().to(torch.uint8)


def _read(path: Path, size: int) -> tuple[Tensor, Tensor] | None:
    """What ``_write`` left at ``path``; None where nothing, or nothing usable, lies there."""
    try:
        arrays = read_arrays(read_file(path, _MOST_BYTES), str(path))
        images, labels = (torch.from_numpy(arrays[name].copy()) for name in ("images", "labels"))
    except (DataError, KeyError):
        return None
    right = images.shape == (size, 3, _SIDE, _SIDE) and images.dtype == torch.uint8
    right = right and labels.shape == (size,) and labels.dtype == torch.int64
    right = right and bool(((labels >= 0) & (labels < len(CHARACTERS))).all())
    return (images, labels) if right else None


def _write(path: Path, images: Tensor, labels: Tensor) -> None:
    """A folder that refuses costs a warning."""
    archive = io.BytesIO()
    np.savez(archive, images=images.numpy(), labels=labels.numpy())
    try:
        replace_file(path, archive.getvalue())
    except OSError as error:
        warnings.warn(
            f"Could not keep the drawn glyphs at {path} ({error}); they will be drawn again next time. "
            "Give a cache_dir that can be written, or cache=False.",
            stacklevel=2,
        )
