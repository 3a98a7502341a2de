"""Makes `torch_fidelity.json`: what torch-fidelity says of features that `features` draws.

Run once, where torch-fidelity is installed (its feature-level functions need no torchvision):

    python tests/evaluation/golden/torch_fidelity_values.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

N_IMAGES, N_REFERENCE, WIDTH, CLASSES = 700, 700, 24, 10


def features(seed: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of images and of a reference, float32 `[n, WIDTH]`, and logits of the images, `[n, CLASSES]`."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
    reference = draw.normal(size=(N_REFERENCE, WIDTH)) @ mixing
    images = 0.9 * draw.normal(size=(N_IMAGES, WIDTH)) @ mixing + 0.1
    images[:200] = 0.3 * images[:200] + 1.0  # a mode too dense, so that precision and recall differ
    logits = 2.0 * draw.normal(size=(N_IMAGES, CLASSES))
    return images.astype(np.float32), reference.astype(np.float32), logits.astype(np.float32)


def main() -> None:
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torch_fidelity.version import __version__

    images, reference, logits = map(torch.from_numpy, features())
    statistics = [fid_features_to_statistics(x) for x in (images, reference)]
    # All features in one subset: the result does not depend on how torch-fidelity shuffles.
    options = {"kid_subsets": 1, "kid_subset_size": N_IMAGES, "verbose": False, "prc_batch_size": 10000}
    values = {
        **fid_statistics_to_metric(*statistics, verbose=False),
        **isc_features_to_metric(logits, splits=1),
        **kid_features_to_metric(images, reference, **options),
        **prc_features_to_metric(images, reference, **options),
    }
    found = {"version": __version__, "command": "python tests/evaluation/golden/torch_fidelity_values.py", "seed": 4}
    found["values"] = {name: float(value) for name, value in values.items()}
    Path(__file__).with_name("torch_fidelity.json").write_text(json.dumps(found, indent=2) + "\n")
    json.dump(found, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
