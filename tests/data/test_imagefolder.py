"""Image folders: the layout, the cut of the test split, the transforms, and each error by its message."""

import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_baqe.data import ImageFolderDataModule
from lightning_baqe.errors import ConfigError, DataError


def fill(root: Path, split: str, counts: dict[str, int], size: tuple[int, int] = (48, 40)) -> None:
    for label, (name, count) in enumerate(counts.items()):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (40 * label, i, 100)).save(root / split / name / f"{i:03}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fill(tmp_path, "train", {"cat": 5, "dog": 4})
    fill(tmp_path, "val", {"cat": 5, "dog": 6})
    return tmp_path


def module(root: Path, **options: int) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, **{"image_size": 32, "num_workers": 0, **options})


def test_classes_are_the_sorted_folders(root: Path) -> None:
    data = module(root)
    assert data.classes == ("cat", "dog")
    assert data.num_classes == 2
    assert data.input_shape == (3, 32, 32)


def test_test_split_is_half_of_val_by_class(root: Path) -> None:
    def parts(seed: int) -> list[set[Path]]:
        return [{path for path, _ in module(root, seed=seed).dataset(split).samples} for split in ("val", "test")]

    val, test = parts(0)
    assert not val & test
    assert val | test == set((root / "val").rglob("*.png"))
    assert Counter(path.parent.name for path in val) == {"cat": 3, "dog": 3}
    assert Counter(path.parent.name for path in test) == {"cat": 2, "dog": 3}
    assert parts(1) == [val, test]


def test_own_test_folder_is_used_whole(root: Path) -> None:
    fill(root, "test", {"cat": 2, "dog": 1})
    data = module(root)
    assert len(data.dataset("val")) == 11
    assert {path for path, _ in data.dataset("test").samples} == set((root / "test").rglob("*.png"))


def test_labels_follow_the_folders(root: Path) -> None:
    for split in ("train", "val", "test"):
        for path, label in module(root).dataset(split).samples:
            assert path.parent.name == ("cat", "dog")[label]


def test_images_deeper_inside_and_other_files(root: Path) -> None:
    (root / "train" / "cat" / "more").mkdir()
    Image.new("L", (40, 40)).save(root / "train" / "cat" / "more" / "grey.JPG", format="JPEG")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._000.png").write_bytes(b"left by another system")
    (root / "train" / ".hidden").mkdir()
    data = module(root)
    assert data.num_classes == 2
    assert len(data.dataset("train")) == 10
    assert all(x.shape == (3, 32, 32) for x, _ in data.dataset("train"))


def test_evaluation_takes_the_centre(tmp_path: Path) -> None:
    """A green square in the middle of a wide red image: all that is left after resize 32 and crop 16."""
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    pixels[14:50, 46:82] = (0, 255, 0)
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    data = module(tmp_path, image_size=16, resize=32)
    x, _ = data.dataset("test")[0]
    green = (torch.tensor([0.0, 1.0, 0.0]) - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert torch.allclose(x, green.view(3, 1, 1).expand(3, 16, 16), atol=1e-5)


def test_default_resize() -> None:
    assert ImageFolderDataModule("anywhere").resize == 256


def test_training_crops_are_random_and_evaluation_is_not(root: Path) -> None:
    rng = np.random.default_rng(0)
    for path in root.rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    data = module(root)
    assert not torch.equal(data.dataset("train")[0][0], data.dataset("train")[0][0])
    assert torch.equal(data.dataset("val")[0][0], data.dataset("val")[0][0])


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder.*<root>/train/<class>.*give another root"):
        _ = module(tmp_path / "nowhere").num_classes


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "elsewhere")
    with pytest.raises(DataError, match=rf"{split} is not a folder.*create it"):
        module(root).setup("fit")


def test_split_without_class_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "0.png")
    with pytest.raises(DataError, match=r"train holds no class folder.*move them so"):
        module(tmp_path).setup()


def test_one_class(tmp_path: Path) -> None:
    """As when the classes lie a folder too deep."""
    fill(tmp_path, "train", {"images/cat": 1, "images/dog": 1})
    with pytest.raises(DataError, match=r"train holds one class folder, 'images', and a classifier needs two or more"):
        _ = module(tmp_path).num_classes


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_without_images(root: Path, split: str) -> None:
    for path in (root / split / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match=rf"{split}/dog holds no image.*add images, or remove the class"):
        module(root).setup()


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_differ(root: Path, split: str) -> None:
    if split == "test":
        fill(root, "test", {"cat": 1, "dog": 1})
    (root / split / "dog").rename(root / split / "dogs")
    message = rf"classes of .*{split} differ from those of .*train: only in train: dog; only in {split}: dogs\. Add or"
    with pytest.raises(DataError, match=message):
        module(root).setup("fit")


def test_many_differences_are_cut_short(root: Path) -> None:
    fill(root, "val", {f"extra{i}": 1 for i in range(9)})
    with pytest.raises(DataError, match="only in val: extra0, extra1, extra2, extra3, extra4 and 4 more"):
        module(root).setup()


def test_val_too_small_to_be_cut(tmp_path: Path) -> None:
    fill(tmp_path, "train", {"cat": 1, "dog": 1})
    fill(tmp_path, "val", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match=r"no test folder.*one image per class.*add .*test, or images to val"):
        module(tmp_path).setup()


def assert_unreadable(data: ImageFolderDataModule) -> None:
    fill(data.root, "test", {"cat": 1, "dog": 1})
    loader = data.val_dataloader()
    message = r"Cannot read the image .*val/cat/000\.png .*replace or remove the file"
    with pytest.raises(DataError, match=message) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)  # they hold the loader's worker, which would be waited for later


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_is_no_image(root: Path, workers: int) -> None:
    (root / "val" / "cat" / "000.png").write_text("not an image")
    assert_unreadable(module(root, num_workers=workers))


def test_truncated_image(root: Path) -> None:
    path = root / "val" / "cat" / "000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    assert_unreadable(module(root))


def test_bad_sizes() -> None:
    with pytest.raises(ConfigError, match="image_size=0, but a whole number of 1 or more"):
        ImageFolderDataModule("anywhere", image_size=0)
    with pytest.raises(ConfigError, match="resize=100, but a whole number of 224 or more"):
        ImageFolderDataModule("anywhere", resize=100)
