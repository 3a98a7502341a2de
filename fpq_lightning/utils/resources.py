"""Files shipped with the code: configurations and the feature network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

FEATURES = "cifar10-features"
_ROOTS = (Path(__file__).parents[1], Path(__file__).parents[2])  # of a wheel, of a checkout


def find_config(name: str | Path) -> str:
    """Finds a configuration file by its path, or a shipped one by a name such as ``fp4_fp8``.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: if it gives a key twice, of which readers of YAML would take the last without a word.
    """
    name = str(name)
    if Path(name).is_file():
        try:
            tree = yaml.compose(Path(name).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return name  # whoever reads it says why it cannot be read
        for key, line in _repeated_keys(tree):
            raise ValueError(f"{name} gives {key} twice, the second time in line {line}: keep one of them")
        return name
    places = [root / "configs" for root in _ROOTS]
    root = next((place for place in places if place.is_dir()), places[0])
    stem = name.removesuffix(".yaml")
    shipped = {str(f.relative_to(root).with_suffix("")): f for f in sorted(root.rglob("*.yaml"))}
    for key, file in shipped.items():
        if stem in (key, f"configs/{key}", Path(key).name):
            return str(file)
    raise FileNotFoundError(f"there is no configuration {name}: give a YAML file or one of {', '.join(shipped)}")


def _repeated_keys(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    """Keys that a mapping within a YAML document holds more than once, with the line of the later one."""
    seen = set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(node, yaml.SequenceNode):
            yield from _repeated_keys(child, path)
            continue
        key, value = child
        name = f"{path}{key.value}"
        if name in seen:
            yield name, key.start_mark.line + 1
        seen.add(name)
        yield from _repeated_keys(value, f"{name}.")


def find_features(name: str) -> str:
    """Finds the directory of a feature network by its path, or the shipped one by its name."""
    places = [Path(name), *(root / "data" / name for root in _ROOTS if name == FEATURES)]
    return str(next((place for place in places if place.is_dir()), places[0]))


def find_checkpoint(name: str) -> Path | None:
    """A file in the cache of torch.hub, where torchvision and torch-fidelity keep weights; None if it is not there."""
    import torch  # which the help of commands does not wait for

    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    return file if file.is_file() else None
