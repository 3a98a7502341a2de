"""Which schedulers a pipeline can be sampled with."""

from __future__ import annotations

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from models import tiny_pipeline

from fpq_lightning import SamplerConfig
from fpq_lightning.diffusion.sampling import set_sampler


def test_a_scheduler_of_the_same_kind_takes_the_place_of_the_pipelines_own() -> None:
    pipeline = tiny_pipeline()
    set_sampler(pipeline, SamplerConfig(scheduler="DPMSolverMultistepScheduler"))
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler


def test_a_scheduler_of_another_kind_is_refused_rather_than_making_wrong_images() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = own = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"sampler\.scheduler DDIMScheduler does not fit .*: leave it out"):
        set_sampler(pipeline, SamplerConfig(scheduler="DDIMScheduler"))
    set_sampler(pipeline, SamplerConfig())
    assert pipeline.scheduler is own


def test_a_class_that_cannot_do_flow_matching_is_refused_for_a_configuration_that_does() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="does not fit the pipeline's UniPCMultistepScheduler"):
        set_sampler(pipeline, SamplerConfig("DDIMScheduler"))
    set_sampler(pipeline, SamplerConfig("DPMSolverMultistepScheduler"))
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    assert pipeline.scheduler.config.use_flow_sigmas
