"""Files shipped with the code: configurations and the feature network."""

from __future__ import annotations

from pathlib import Path

FEATURES = "cifar10-features"
_ROOTS = (Path(__file__).parents[1], Path(__file__).parents[2])  # of a wheel, of a checkout


def find_config(name: str | Path) -> str:
    """Finds a configuration file by its path, or a shipped one by a name such as ``fp4_fp8``.

    Raises:
        FileNotFoundError: if it is neither.
    """
    name = str(name)
    if Path(name).is_file():
        return name
    places = [root / "configs" for root in _ROOTS]
    root = next((place for place in places if place.is_dir()), places[0])
    stem = name.removesuffix(".yaml")
    shipped = {str(f.relative_to(root).with_suffix("")): f for f in sorted(root.rglob("*.yaml"))}
    for key, file in shipped.items():
        if stem in (key, f"configs/{key}", Path(key).name):
            return str(file)
    raise FileNotFoundError(f"there is no configuration {name}: give a YAML file or one of {', '.join(shipped)}")


def find_features(name: str) -> str:
    """Finds the directory of a feature network by its path, or the shipped one by its name."""
    places = [Path(name), *(root / "data" / name for root in _ROOTS if name == FEATURES)]
    return str(next((place for place in places if place.is_dir()), places[0]))


def find_checkpoint(name: str) -> Path | None:
    """A file in the cache of torch.hub, where torchvision and torch-fidelity keep weights; None if it is not there."""
    import torch  # which the help of commands does not wait for

    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    return file if file.is_file() else None
