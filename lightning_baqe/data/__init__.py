"""Lightning data modules: digits, drawn glyphs, photographs of clothes and of solar cells, your own image folders."""

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
