"""What every data module promises, asked of each of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from small_data import small_elpv, small_fashion_mnist
from torch import Tensor, nn

from lightning_baqe.data import (
    DigitsDataModule,
    ElpvDataModule,
    FashionMnistDataModule,
    GlyphsDataModule,
    ImageDataModule,
    ImageFolderDataModule,
)
from lightning_baqe.data.base import SPLITS
from lightning_baqe.errors import ConfigError, DataError

RECIPES = Path(__file__).parents[2] / "recipes" / "data"
Make = Callable[..., ImageDataModule]


@pytest.fixture(params=["digits", "elpv", "fashion_mnist", "glyphs", "imagefolder"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "digits":
        return DigitsDataModule
    if request.param == "glyphs":
        return lambda **options: GlyphsDataModule(130, 70, 80, cache_dir=tmp_path, **options)
    if request.param == "fashion_mnist":
        small_fashion_mnist(tmp_path / "idx", train=150, test=60)
        return lambda **options: FashionMnistDataModule(tmp_path / "idx", **{"val_size": 50, **options})
    if request.param == "elpv":
        small_elpv(tmp_path / "elpv", 160)
        return lambda **options: ElpvDataModule(tmp_path / "elpv", 32, **options)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 20)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (rng.integers(36, 60), rng.integers(36, 60), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return lambda **options: ImageFolderDataModule(tmp_path / "images", 32, **{"num_workers": 0, **options})


def collect(loader: torch.utils.data.DataLoader) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


class Tiny(pl.LightningModule):
    def __init__(self, data: ImageDataModule) -> None:
        super().__init__()
        size = int(np.prod(data.input_shape))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(size, data.num_classes))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.training_step(batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_attributes_are_known_before_setup(make: Make) -> None:
    data = make()
    assert data.num_classes == len(data.classes) == len(set(data.classes)) > 1
    assert data.input_shape == (3, 32, 32)
    assert data.example_input.shape == (1, *data.input_shape)
    assert data.example_input.dtype == torch.float32
    assert data.name == type(data).name
    assert len(data.mean) == len(data.std) == 3


def test_batches(make: Make) -> None:
    data = make(batch_size=16)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        x, y = next(iter(loader))
        assert x.dtype == torch.float32
        assert x.shape == (16, *data.input_shape)
        assert y.dtype == torch.int64
        assert y.shape == (16,)
        assert torch.isfinite(x).all()
        pixels = x * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
        assert pixels.min() > -1e-5
        assert pixels.max() < 1 + 1e-5
        assert y.min() >= 0
        assert y.max() < data.num_classes


def test_items_equal_batches(make: Make) -> None:
    data = make(batch_size=5)
    x, y = next(iter(data.val_dataloader()))
    dataset = data.dataset("val")
    for i in range(5):
        assert torch.equal(dataset[i][0], x[i])
        assert torch.equal(dataset[i][1], y[i])


def test_train_drops_the_rest_and_evaluation_keeps_it(make: Make) -> None:
    data = make(batch_size=7)
    sizes = {split: len(data.dataset(split)) for split in SPLITS}
    assert len(collect(data.train_dataloader())[1]) == sizes["train"] // 7 * 7
    assert len(collect(data.val_dataloader())[1]) == sizes["val"]
    assert len(collect(data.test_dataloader())[1]) == sizes["test"]


def test_order_follows_the_seed(make: Make) -> None:
    def labels(seed: int) -> Tensor:
        return collect(make(seed=seed, batch_size=8).train_dataloader())[1]

    torch.manual_seed(1)
    first = labels(0)
    torch.manual_seed(2)
    assert torch.equal(first, labels(0))
    assert not torch.equal(first, labels(1))


def test_epochs_differ_and_a_new_loader_starts_again(make: Make) -> None:
    data = make(batch_size=8)
    loader = data.train_dataloader()
    first, second = collect(loader)[1], collect(loader)[1]
    assert not torch.equal(first, second)
    assert torch.equal(first, collect(data.train_dataloader())[1])


def test_evaluation_is_in_fixed_order(make: Make) -> None:
    for split in ("val", "test"):
        (x, y), (x2, y2) = (collect(getattr(make(batch_size=8), f"{split}_dataloader")()) for _ in range(2))
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_setup_is_idempotent_and_makes_what_the_stage_needs(make: Make) -> None:
    data = make()
    data.setup("fit")
    assert set(data._datasets) == {"train", "val"}
    before = dict(data._datasets)
    data.setup("fit")
    data.setup("test")
    assert set(data._datasets) == set(SPLITS)
    assert all(data.dataset(split) is dataset for split, dataset in before.items())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning under a new torch
def test_lightning_round_trip(make: Make, tmp_path: Path) -> None:
    data = make(batch_size=8)
    trainer = pl.Trainer(
        fast_dev_run=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False
    )
    module = Tiny(data)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert trainer.state.finished


def test_worker_processes_give_the_same_batches(make: Make) -> None:
    alone, helped = (collect(make(batch_size=8, num_workers=n).val_dataloader()) for n in (0, 1))
    assert torch.equal(alone[0], helped[0])
    assert torch.equal(alone[1], helped[1])


def test_batch_size_beyond_the_training_images(make: Make) -> None:
    data = make(batch_size=5000)
    with pytest.raises(DataError, match=r"batch_size=5000, but \w+ has \d+ training images.*give batch_size="):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0, but a whole number of 1 or more"),
        ({"batch_size": 2.5}, "batch_size=2.5, but a whole number"),
        ({"seed": -1}, "seed=-1, but a whole number of 0 or more"),
        ({"num_workers": -1}, "num_workers=-1, but a whole number of 0 or more"),
    ],
)
def test_bad_arguments(make: Make, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match="split is 'dev', which is none of"):
        DigitsDataModule().dataset("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["digits", "glyphs", "imagefolder"])
def test_recipe_names_the_class_and_its_arguments(name: str) -> None:
    config = OmegaConf.load(RECIPES / f"{name}.yaml")
    assert OmegaConf.missing_keys(config) == ({"root"} if name == "imagefolder" else set())
    data = instantiate(config, **({"root": "/nowhere"} if name == "imagefolder" else {}))
    assert isinstance(data, ImageDataModule)
    assert data.name == name
