"""What decides a calibration set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.utils.files import differences
from fpq_lightning.utils.provenance import fingerprint


@dataclass(frozen=True)
class CalibrationKey:
    """Everything that decides a calibration set: two sets with equal keys are equal.

    Attributes:
        model_weights: hash of the weights of all denoisers.
        n_samples: size of the set.
        seed: of the first trajectory's noise.
        source: ``trajectories``, or a dataset of real images.
        image_column: of that dataset.
        timesteps: how often each timestep is kept.
        weighting: of the samples.
        sampler: what decides an image, from `SamplerConfig.identity`, and the batch size.

    Example:
        >>> key = CalibrationKey("9f25", 2048, 0, "trajectories", "image", "uniform", "sensitivity", {"steps": 25})
        >>> key.differences({**key.to_dict(), "seed": 1})
        ['seed: 1 -> 0']
    """

    model_weights: str
    n_samples: int
    seed: int
    source: str
    image_column: str
    timesteps: str
    weighting: str
    sampler: dict[str, Any]

    _OPTIONS = ("n_samples", "seed", "source", "image_column", "timesteps", "weighting")

    @classmethod
    def of(cls, options: Any, sampler: SamplerConfig, model_weights: str) -> CalibrationKey:
        """The key of a set that is to be made.

        Args:
            options: has the attributes `n_samples` to `weighting`, as `CalibrationDataModule` does.
            sampler: how images are sampled.
            model_weights: hash of the weights of all denoisers.
        """
        values = {name: getattr(options, name) for name in cls._OPTIONS}
        return cls(model_weights, **values, sampler={**sampler.identity(), "batch_size": sampler.batch_size})

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``made_from.json``, plain types only."""
        values = json.loads(json.dumps(asdict(self)))
        values["model"] = values.pop("model_weights")
        return values

    @property
    def digest(self) -> str:
        """A short hash, for names of directories."""
        return fingerprint(self.to_dict())

    def differences(self, made_from: Mapping[str, Any]) -> list[str]:
        """How a set that was made from other values differs, as ``name: there -> here``; empty for the same set.

        Args:
            made_from: `to_dict` of the key of that set.
        """
        return differences(dict(made_from), self.to_dict())
