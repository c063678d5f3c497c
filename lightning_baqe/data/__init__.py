"""Lightning data modules: embedded digits, drawn glyphs and the user's own image folders."""

from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.data.digits import DigitsDataModule
from lightning_baqe.data.glyphs import GlyphsDataModule
from lightning_baqe.data.imagefolder import ImageFolderDataModule

__all__ = ["DigitsDataModule", "GlyphsDataModule", "ImageDataModule", "ImageFolderDataModule"]
