"""The examples in the docstrings of the metrics run."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest

from fpq_lightning.evaluation import metrics

NAMES = [module.name for module in iter_modules(metrics.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_metric_say_what_it_returns(name: str) -> None:
    module = import_module(f"{metrics.__name__}.{name}")
    assert doctest.testmod(module).failed == 0


def test_metrics_have_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_examples = {
        name
        for name in NAMES
        if any(test.examples for test in finder.find(import_module(f"{metrics.__name__}.{name}")))
    }
    assert with_examples >= {"class_accuracy", "clip_score", "frechet", "inception_score", "kernel"}
    assert with_examples >= {"precision_recall", "psnr", "ssim"}
