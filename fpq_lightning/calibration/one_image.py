"""Where an image lies in the arguments of a denoiser, for pipelines that never make two in a call.

Calls for one image each are put together to a batch. An axis is right if the network then gives for each image what it
gave for it alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fpq_lightning.calibration.axes import Axis, are_same, collapsed, images_of, joined
from fpq_lightning.calibration.recorder import Call
from fpq_lightning.graph.tree import cloned, named_leaves, output_leaves
from fpq_lightning.utils.closeness import is_close


@torch.no_grad()
def find_axes_of_one(denoiser: nn.Module, calls: Sequence[Call], others: Sequence[Call]) -> dict[str, Axis]:
    """The axes of the arguments that hold an image, by path.

    Args:
        denoiser: the network.
        calls: of the first step of one image.
        others: of the same step of another image.

    Raises:
        ValueError: if no axes explain what the network gives for both.
    """
    if len(calls) != len(others):
        raise ValueError("the images are not made with as many calls")
    found: dict[str, Axis] = {}
    for call, other in zip(calls, others, strict=True):
        found = _of_call(denoiser, call, other) | found
    return found


def _of_call(denoiser: nn.Module, call: Call, other: Call) -> dict[str, Axis]:
    rows = len(call.output[0])
    values = dict(named_leaves(other.arguments))
    leaves = named_leaves(call.arguments)
    tensors = {path: x for path, x in leaves if isinstance(x, Tensor) and x.ndim and len(x) == rows}
    changing = [path for path, x in tensors.items() if not are_same(x, values.get(path))]
    # Rows are those of guidance passes, or belong to the image, such as its frames.
    for folded in dict.fromkeys((1, rows)):
        for paths in (tensors, changing):  # there are constants that look like an image
            axes = {path: Axis(folded=folded) for path in paths}
            if axes and _are_images(denoiser, call, other, axes, rows // folded):
                return axes
    raise ValueError("no part of the arguments is that of one image")


def _are_images(denoiser: nn.Module, call: Call, other: Call, axes: dict[str, Axis], passes: int) -> bool:
    """Whether a batch of two images gives what each of them gave."""
    (structure, leaves), (other_structure, others) = (collapsed(one.arguments, axes) for one in (call, other))
    shared = leaves.keys() - axes.keys()
    if structure != other_structure or not all(are_same(leaves[path], others[path]) for path in shared):
        return False
    for p in range(passes):
        given = dict(leaves)
        for path, axis in axes.items():
            images = [images_of(one[path], axis, 1)[p][0] for one in (leaves, others)]
            if images[0].shape != images[1].shape:
                return False
            given[path] = joined(torch.stack(images), axis)
        try:
            found = output_leaves(denoiser(**tree_map(lambda path, given=given: cloned(given[path]), structure)))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a network may do with a batch that it does not take
            return False
        size = len(call.output[0]) // passes
        outputs = zip(call.output, other.output, strict=True)
        both = [torch.cat([one[p * size : (p + 1) * size] for one in pair]) for pair in outputs]
        if len(found) != len(both) or not all(map(_alike, found, both)):
            return False
    return True


def _alike(some: Tensor, others: Tensor) -> bool:
    """Whether outputs are the same but for the order of sums."""
    tolerance = 0.01 if some.dtype == torch.float32 else 0.1
    return some.shape == others.shape and is_close(some.float(), others.float(), tolerance)
