"""The search of a layer against trying every candidate by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpq_lightning import ActivationRecipe, Recipe, WeightRecipe
from fpq_lightning.formats.numbers import Format
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.search import search_tensor_error
from fpq_lightning.reconstruction.initialise import _Places, collect_layer_inputs, search_unit

FACTORS = (0.76, 0.82, 0.88, 0.94, 1.0, 1.06, 1.12)  # of the clip of least tensor error


def search(weight: Tensor, x: Tensor, weights: Tensor, recipe: Recipe) -> Any:
    """The quantizers that the search gives one linear layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    quantized = make_quantized(layer, recipe.granularity())
    search_unit(Unit("proj", quantized, {"proj": quantized}), {"proj": x}, weights, recipe)
    return quantized.variants["nearest"]


def candidates(fmt: Format, values: Tensor) -> list[Quantizer]:
    """Multiples of the clip that is best for the values themselves."""
    scales = values.abs().max() * torch.linspace(0.1, 1.2, 111) / fmt.max
    errors = [(Quantizer(fmt, s)(values).double() - values.double()).square().sum().item() for s in scales]
    best = scales[min(range(111), key=errors.__getitem__)]
    return [Quantizer(fmt, best * factor) for factor in FACTORS]


@pytest.mark.parametrize("seed", [1, 3, 4, 5])
def test_activations_are_searched_on_the_output_of_the_quantized_weights(seed: int) -> None:
    """Half of the weights are rounded to zero, so that what the large inputs beside them lose does not matter."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 8, generator=generator)
    weight[:, 4:] = 0.05 * torch.rand(6, 4, generator=generator).sign()
    x = torch.randn(40, 8, generator=generator) * torch.tensor([1.0] * 4 + [12.0] * 4)
    recipe = Recipe(
        WeightRecipe("e2m1", granularity="tensor", objective="max"), ActivationRecipe("fp6", objective="output")
    )
    found = search(weight, x, torch.ones(40), recipe)
    rounded = found.weights[0](weight.reshape(1, -1)).reshape(weight.shape)
    assert (rounded[:, 4:] == 0).all()
    values = torch.cat([x.flatten(), x.min()[None], x.max()[None]])

    def best(weight: Tensor) -> Quantizer:
        trials = [trial for fmt in recipe.activation_formats() for trial in candidates(fmt, values)]
        return min(trials, key=lambda trial: ((trial(x) - x).double() @ weight.double().T).square().sum().item())

    expected, other = best(rounded), best(weight)
    assert (found.inputs[0].format, found.inputs[0].scale.item()) == (
        expected.format,
        pytest.approx(expected.scale.item(), rel=1e-5),
    )
    assert (expected.format, expected.scale.item()) != (other.format, other.scale.item())  # they are told apart


@pytest.mark.parametrize("seed", [9, 16, 23, 28])
def test_weights_are_searched_on_the_output_weighted_by_the_samples(seed: int) -> None:
    """The samples that count more see large values in other channels than the rest."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 12, generator=generator) ** 3
    x = torch.randn(60, 12, generator=generator)
    significance = torch.tensor([1.7] * 30 + [0.3] * 30)
    x[:30, :6] *= 0.1
    x[30:, 6:] *= 0.1
    recipe = Recipe(WeightRecipe("fp4", granularity="tensor"), ActivationRecipe(None))
    found = search(weight, x, significance, recipe).weights[0]

    def best(significance: Tensor) -> Quantizer:
        def error(trial: Quantizer) -> float:
            output = x.double() @ (trial(weight) - weight).double().T
            return (output.square().sum(1) * significance.double()).sum().item()

        return min([trial for fmt in recipe.weight_formats() for trial in candidates(fmt, weight)], key=error)

    expected, others = best(significance), [best(torch.ones(60)), best(significance**2)]
    assert found.format == expected.format
    assert found.scale.item() == pytest.approx(expected.scale.item(), rel=1e-5)
    assert all(
        (other.format, other.scale) != (expected.format, expected.scale) for other in others
    )  # they are told apart


# --- layers that run several times ---------------------------------------------------------------------------------


def _layer(plain: nn.Module, recipe: Recipe) -> Any:
    return make_quantized(plain.requires_grad_(False), recipe.granularity())


@pytest.mark.parametrize("recipe", [
    Recipe(),
    Recipe(activations=ActivationRecipe("fp8", granularity="token")),
    Recipe(activations=ActivationRecipe("fp6", objective="output")),
])  # fmt: skip
def test_a_layer_called_with_several_shapes_is_searched_over_the_values_of_all_calls(recipe: Recipe) -> None:
    """As one call with all tokens side by side; the tokens of one stream are larger than those of the other."""
    torch.manual_seed(0)
    plain, weights = nn.Linear(6, 5), torch.rand(8) + 0.5
    image, text = torch.randn(8, 16, 6), torch.randn(8, 3, 6) * torch.tensor([40.0, 1, 1, 20, 1, 1])
    twice, once = (_layer(copy.deepcopy(plain), recipe) for _ in range(2))
    unit = Unit("ff", twice, {"ff": twice})
    calls = (twice(image[rows]) is twice(text[rows]) for rows in torch.arange(8).split(3))
    search_unit(unit, collect_layer_inputs(unit, calls), weights, recipe)
    search_unit(Unit("ff", once, {"ff": once}), {"ff": torch.cat([image, text], 1)}, weights, recipe)
    found, expected = (layer.variants["nearest"].to_state() for layer in (twice, once))
    assert str(found) == str(expected)
    alone = _layer(copy.deepcopy(plain), recipe)
    search_unit(Unit("ff", alone, {"ff": alone}), {"ff": image}, weights, recipe)
    assert str(alone.variants["nearest"].to_state()) != str(expected)  # they are told apart


def test_a_convolution_called_with_images_of_two_sizes_is_clipped_for_both() -> None:
    torch.manual_seed(0)
    recipe = Recipe(activations=ActivationRecipe("fp8", objective="max"))
    layer = _layer(nn.Conv2d(3, 4, 3, padding=1), recipe)
    large, small = torch.randn(4, 3, 8, 8), 9 * torch.randn(4, 3, 4, 4)
    unit = Unit("conv", layer, {"conv": layer})
    inputs = collect_layer_inputs(unit, (layer(large) is layer(small) for _ in range(1)))
    assert [x.shape for x in inputs["conv"]] == [large.shape, small.shape]
    search_unit(unit, inputs, torch.ones(4), recipe)
    assert layer.variants["nearest"].inputs[0].clip.item() == pytest.approx(small.abs().max().item())


def test_a_layer_without_inputs_keeps_them_in_full_precision_and_rounds_its_weight_to_nearest() -> None:
    layer = _layer(nn.Linear(6, 5), Recipe())
    unit = Unit("expert", layer, {"expert": layer})
    inputs = collect_layer_inputs(unit, (layer(torch.zeros(0, 6)) for _ in range(2)))
    assert not inputs
    search_unit(unit, inputs, torch.ones(4), Recipe())
    nearest = layer.variants["nearest"]
    assert not len(nearest.inputs)
    expected = search_tensor_error(layer.weight_rows()[0], Recipe().weight_formats())
    assert torch.equal(nearest.weights[0].scale, expected.scale)


def test_a_vector_without_a_batch_is_a_batch_of_one() -> None:
    layer = _layer(nn.Linear(6, 5), Recipe())
    unit, vector = Unit("v", layer, {"v": layer}), torch.randn(6)
    inputs = collect_layer_inputs(unit, (layer(vector) for _ in range(3)))
    assert torch.equal(inputs["v"], vector.expand(3, 6))


# Layers, shapes of their inputs, and splits.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "tokens": (lambda: nn.Linear(6, 4), (6, 5, 6), (6,)),
    "more tokens than are looked at": (lambda: nn.Linear(6, 4), (100, 900, 6), (4, 2)),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, padding=1), (6, 6, 8, 8), (4, 2)),
    "with a stride": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (6, 6, 8, 8), (6,)),
    "with groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 6, 9, 9), (3,)),
    "large": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (100, 6, 40, 40), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("passes", [1, 4])
def test_output_errors_of_a_weight_are_those_of_the_layer_itself(name: str, passes: int) -> None:
    make, shape, splits = LAYERS[name]
    torch.manual_seed(0)
    x, weights = torch.randn(2, *shape), torch.rand(shape[0])
    x[1] *= 3  # another call
    layer = make_quantized(make().requires_grad_(False), Recipe().granularity())
    layer.splits = splits
    factors = weights.sqrt()
    places = _Places(layer, [*x], [factors, factors], torch.arange(len(factors)), passes)
    for number, part in enumerate(layer.weight_parts()):
        alone = torch.zeros_like(layer.weight)
        alone.split(splits, dim=1)[number].copy_(part)
        outputs = torch.stack([layer.operate(call, alone, None) for call in x])
        each = outputs * factors.reshape(-1, *[1] * (outputs.ndim - 2))
        other_dims = [d for d in range(outputs.ndim) if d != (outputs.ndim - 1 if outputs.ndim == 4 else 2)]
        expected = each.double().square().sum(other_dims)
        every = shape[1] <= 64 and shape[-1] < 10
        assert torch.allclose(places.energy(number, part).double(), expected, rtol=1e-5 if every else 0.15)
