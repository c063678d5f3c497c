"""Lightning data modules: digits, drawn glyphs, photographs of clothes and of solar cells, your own image folders."""

from typing import TYPE_CHECKING

from lightning_baqe.lazy import on_first_use

if TYPE_CHECKING:
    from lightning_baqe.data.base import ImageDataModule
    from lightning_baqe.data.digits import DigitsDataModule
    from lightning_baqe.data.elpv import ElpvDataModule
    from lightning_baqe.data.fashion_mnist import FashionMnistDataModule
    from lightning_baqe.data.glyphs import GlyphsDataModule
    from lightning_baqe.data.imagefolder import ImageFolderDataModule

__all__ = [
    "DigitsDataModule",
    "ElpvDataModule",
    "FashionMnistDataModule",
    "GlyphsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
]
__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "base": ["ImageDataModule"],
        "digits": ["DigitsDataModule"],
        "elpv": ["ElpvDataModule"],
        "fashion_mnist": ["FashionMnistDataModule"],
        "glyphs": ["GlyphsDataModule"],
        "imagefolder": ["ImageFolderDataModule"],
    },
)
