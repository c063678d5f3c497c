"""Crops of the photographs that scikit-image and scikit-learn ship: pictures for ImageNet's networks without a download."""  # noqa: E501

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_baqe.data.pictures import read_image
from lightning_baqe.errors import ConfigError

INSTALL = "uv sync --group bench"
_PHOTOGRAPHS = {
    "skimage": [
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/rocket.jpg",
        "data/retina.jpg",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop, as ImageNet's networks are trained on


def photographs() -> list[Path]:
    """The files.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    found = []
    for package, names in _PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(f"the photographs come with {package}, which is not installed: {INSTALL}")
        found += [Path(spec.origin).parent / name for name in names]
    return found


def crops(count: int, size: int, seed: int) -> torch.Tensor:
    """Random crops of random size and shape, half of them mirrored, of all photographs in turns.

    Returns:
        ``(count, 3, size, size)`` uint8.
    """
    random, pictures = np.random.default_rng(seed), [read_image(path) for path in photographs()]
    found = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        area = random.uniform(*_AREA) * picture.width * picture.height
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        width, height = min(picture.width, int((area * ratio) ** 0.5)), min(picture.height, int((area / ratio) ** 0.5))
        left, top = random.integers(picture.width - width + 1), random.integers(picture.height - height + 1)
        box = (int(left), int(top), int(left) + width, int(top) + height)
        crop = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(np.asarray(crop))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
