"""The drawn glyphs: fonts, balance, determinism, the cache, and that something can be learned from them."""

from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.ft2font import FT2Font

import lightning_baqe.data.glyphs as glyphs
from lightning_baqe.data import GlyphsDataModule
from lightning_baqe.data.base import SPLITS
from lightning_baqe.data.glyphs import CHARACTERS, TEST_FONTS, TRAIN_FONTS, draw_glyphs, font_path, fonts_of
from lightning_baqe.errors import ConfigError, DataError


def small(**options: object) -> GlyphsDataModule:
    return GlyphsDataModule(**{"train_size": 200, "val_size": 130, "test_size": 150, "cache": False, **options})


def images_of(data: GlyphsDataModule) -> dict[str, torch.Tensor]:
    return {split: data.dataset(split).images for split in SPLITS}


def test_test_typefaces_are_not_in_training() -> None:
    assert not set(TRAIN_FONTS) & set(TEST_FONTS)
    assert fonts_of("train") == fonts_of("val") == TRAIN_FONTS
    assert fonts_of("test") == TEST_FONTS
    families = [{FT2Font(font_path(name)).family_name for name in fonts} for fonts in (TRAIN_FONTS, TEST_FONTS)]
    assert not families[0] & families[1]


@pytest.mark.parametrize("name", TRAIN_FONTS + TEST_FONTS)
def test_font_draws_62_different_characters(name: str) -> None:
    assert {ord(c) for c in CHARACTERS} <= set(FT2Font(font_path(name)).get_charmap())
    masks = glyphs._rasterise(name)
    assert len({mask.numpy().tobytes() for mask in masks}) == 62
    ink = masks.flatten(1) > 127
    assert ink.sum(1).min() > 50
    frame = torch.ones(64, 64, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert masks[:, frame].max() == 0, "a character touches the edge of its raster"


def test_every_font_of_matplotlib_is_judged() -> None:
    """Fails when a new matplotlib brings a font: look at it, then list it or leave it out by name."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    symbols = {"cmex10", "cmmi10", "cmsy10", "LastResortHE-Regular"}
    complete = {
        path.stem
        for path in folder.glob("*.ttf")
        if path.stem not in symbols and {ord(c) for c in CHARACTERS} <= set(FT2Font(path).get_charmap())
    }
    assert set(TRAIN_FONTS + TEST_FONTS) == complete


def test_sizes_and_balance() -> None:
    data = small()
    assert {split: len(images) for split, images in images_of(data).items()} == {"train": 200, "val": 130, "test": 150}
    for split in SPLITS:
        counts = data.dataset(split).labels.bincount(minlength=62)
        assert counts.max() - counts.min() <= 1


def test_splits_are_disjoint() -> None:
    seen = [image.numpy().tobytes() for images in images_of(small()).values() for image in images]
    assert len(set(seen)) == len(seen)


def test_seed_decides_every_pixel() -> None:
    torch.manual_seed(1)
    first = images_of(small())
    torch.manual_seed(2)
    again, other = images_of(small()), images_of(small(seed=1))
    for split in SPLITS:
        assert torch.equal(first[split], again[split])
        assert not torch.equal(first[split], other[split])


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    images_of(small())
    assert torch.equal(torch.rand(4), expected)


def test_normalisation() -> None:
    x = torch.stack([x for x, _ in small(train_size=2000).dataset("train")])
    assert x.mean((0, 2, 3)).abs().max() < 0.05
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_cache_gives_the_same_and_draws_once(tmp_path: Path) -> None:
    drawn = images_of(small())
    small(cache=True, cache_dir=tmp_path).prepare_data()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[1] for name in names] == ["test", "train", "val"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    data = small(cache=True, cache_dir=tmp_path)
    data.prepare_data()
    data.setup()
    for split, images in images_of(data).items():
        assert torch.equal(images, drawn[split])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_cache_tells_parameters_apart(tmp_path: Path) -> None:
    for options in ({}, {"seed": 1}, {"train_size": 201}):
        small(cache=True, cache_dir=tmp_path, **options).dataset("train")
    assert len(list(tmp_path.glob("glyphs-train-*.npz"))) == 3


@pytest.mark.parametrize("content", [b"", b"not an archive", None])
def test_broken_cache_file_is_drawn_again(tmp_path: Path, content: bytes | None) -> None:
    whole = small(cache=True, cache_dir=tmp_path).dataset("val").images
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    assert torch.equal(small(cache=True, cache_dir=tmp_path).dataset("val").images, whole)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size > whole.numel()


def test_cache_folder_that_refuses_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = small(cache=True, cache_dir=tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match=r"Could not keep the drawn glyphs.*Give a cache_dir that can be written"):
        assert len(data.dataset("val")) == 130


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path / "own"))
    assert GlyphsDataModule().cache_dir == tmp_path / "own"
    monkeypatch.delenv("LIGHTNING_BAQE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert GlyphsDataModule().cache_dir == tmp_path / "lightning_baqe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert GlyphsDataModule().cache_dir == tmp_path / "home" / ".cache" / "lightning_baqe"


def test_missing_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs.matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match=r"draws with the font .*DejaVuSans\.ttf.*install matplotlib from PyPI"):
        small().dataset("train")


def test_bad_size() -> None:
    with pytest.raises(ConfigError, match="test_size=0, but a whole number of 1 or more"):
        small(test_size=0)


def test_can_be_learned_but_not_easily() -> None:
    """Nearest class mean of the contrast with the border: far above chance (1/62), far below the ceiling."""

    def features(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = draw_glyphs(size, TRAIN_FONTS, torch.Generator().manual_seed(seed))
        x = images.float()
        border = torch.cat([x[:, :, :2].flatten(2), x[:, :, -2:].flatten(2)], 2).median(2).values
        contrast = (x - border[:, :, None, None]).square().sum(1).sqrt().flatten(1)
        return centred(contrast), labels

    def centred(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1)

    x, y = features(4000, 0)
    means = centred(torch.zeros(62, x.shape[1]).index_add_(0, y, x))
    x, y = features(1000, 1)
    accuracy = ((x @ means.T).argmax(1) == y).float().mean()
    assert 0.2 < accuracy < 0.9
