"""The calibration set is what the network was really called with, whatever a pipeline passes."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fpq_lightning.calibration.axes import Axis, find_axes, images_of, joined
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.disk import load_calibration_set, save_calibration_set
from fpq_lightning.calibration.recorder import output_sensitivity
from fpq_lightning.calibration.trajectories import sample_trajectories
from fpq_lightning.diffusion.sampling import SamplerConfig, generate
from fpq_lightning.training.datamodule import CalibrationDataModule, UnitBatches

SAMPLER = SamplerConfig(steps=4, batch_size=3)


class Network(ModelMixin, ConfigMixin):
    """Notes down what it is called with."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, timestep: Any, **other: Any) -> tuple[Tensor]:
        self.calls.append({"x": x, "timestep": timestep, **other})
        return (self.layer(x) + torch.as_tensor(timestep).float().reshape(-1, 1, 1, 1) / 1000,)


class Pipeline(DiffusionPipeline):
    """Samples with DDIM; subclasses say how they call the network."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.transformer(x, timestep=t)[0]

    @torch.no_grad()
    def __call__(
        self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int = 5, output_type: str = "np"
    ) -> ImagePipelineOutput:
        x = torch.stack([torch.randn(2, 4, 4, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.predict(x, t), t, x).prev_sample
        return ImagePipelineOutput(images=x[:, :1].permute(0, 2, 3, 1).sigmoid().numpy())


def make(kind: type[Pipeline] = Pipeline, network: nn.Module | None = None) -> Pipeline:
    torch.manual_seed(0)
    pipeline = kind((network or Network()).eval(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def recorded(kind: type[Pipeline], n: int = 12, sampler: SamplerConfig = SAMPLER) -> CalibrationSet:
    return sample_trajectories(make(kind), sampler, n, seed=5)


def batch(found: CalibrationSet, rows: list[int]) -> dict[str, Any]:
    return found.batch(torch.tensor(rows), torch.device("cpu"))


# --- where images lie ----------------------------------------------------------------------------------------------


@given(
    passes=st.integers(1, 3),
    folded=st.integers(1, 3),
    dim=st.integers(0, 2),
    images=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_the_axis_of_images_is_found_and_taken_apart(
    passes: int, folded: int, dim: int, images: int, seed: int
) -> None:
    values = torch.randn(passes, images + 1, folded, 5, 6, generator=torch.Generator().manual_seed(seed))

    def call(n: int) -> dict[str, Any]:
        return {"x": values[:, :n].flatten(0, 2).movedim(0, dim), "flag": True, "scale": torch.ones(3)}

    axes = find_axes("Network", call(images), call(images + 1), images)
    # One image cannot tell its rows from those of another pass if there is but one of either.
    assert axes == {"x": Axis("dim", dim, folded)}
    taken = images_of(call(images)["x"], axes["x"], images)
    for p in range(passes):
        for i in range(images):
            expected = values[p, i] if folded > 1 else values[p, i, 0]
            assert torch.equal(taken[p][i], expected)
        assert torch.equal(joined(torch.stack(taken[p]), axes["x"]), values[p, :images].flatten(0, 1).movedim(0, dim))


def test_lists_with_an_item_for_each_image_are_taken_apart() -> None:
    def call(n: int) -> dict[str, Any]:
        return {"x": [torch.full((2,), float(i)) for i in range(n)] * 2, "shapes": [(1, i) for i in range(n)] * 2}

    axes = find_axes("Network", call(2), call(3), 2)
    assert axes == {"x": Axis("list"), "shapes": Axis("list")}
    assert images_of(call(2)["shapes"], axes["shapes"], 2) == [[(1, 0), (1, 1)]] * 2


@pytest.mark.parametrize("kind", [list, tuple])
def test_images_that_are_items_stay_in_a_container_of_its_kind(kind: Any) -> None:
    class Strict(Network):
        def forward(self, x: Any, timestep: Any, **other: Any) -> tuple[Tensor]:
            assert type(x) is kind
            assert all(type(image) is kind for image in x)
            return super().forward(torch.stack([image[0] for image in x]), timestep, **other)

    class Items(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(kind(kind([image]) for image in x), timestep=t)[0]

    found = sample_trajectories(make(Items, Strict()), SAMPLER, 8)
    assert type(batch(found, [0, 1])["x"]) is kind


@pytest.mark.parametrize(
    "value", [lambda n: torch.zeros(n + 1), lambda n: torch.zeros(n, n), lambda n: n, lambda n: [0] * (n + 1)]
)
def test_what_grows_in_another_way_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(ValueError, match="Network is called with odd/one") as error:
        find_axes("Network", {"odd": {"one": value(2)}}, {"odd": {"one": value(3)}}, 2)
    assert "\n" not in str(error.value)


# --- what a call holds ---------------------------------------------------------------------------------------------


def test_containers_come_back_as_they_were() -> None:
    class Nested(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            more = {0: x[:, :1], "none": None, "size": (4, 4), "empty": [], "two": [x, (x, 1.5)]}
            return self.transformer(x, timestep=t, more=more, images=[])[0]

    found = batch(recorded(Nested), [2, 0])
    assert found["images"] == []
    more = found["more"]
    assert more["size"] == (4, 4)
    assert more["none"] is None
    assert more["empty"] == []
    assert torch.equal(more[0], found["x"][:, :1])
    assert torch.equal(more["two"][0], found["x"])
    assert isinstance(more["two"], list)
    assert isinstance(more["two"][1], tuple)
    assert more["two"][1][1] == 1.5


def test_what_the_network_takes_out_or_overwrites_is_kept_as_it_came_in() -> None:
    class Greedy(Network):
        def forward(self, x: Tensor, timestep: Any, residuals: list[Tensor]) -> tuple[Tensor]:
            output = super().forward(x + residuals.pop(), timestep)
            x.zero_()
            return output

    class Adapter(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x.clone(), timestep=t, residuals=[torch.full_like(x, 7.0)])[0]

    found = sample_trajectories(make(Adapter, Greedy()), SAMPLER, 8)
    assert found.inputs["x"].flatten(1).norm(dim=1).min() > 0
    assert (batch(found, [0, 3])["residuals"][0] == 7).all()


def test_what_cannot_be_kept_is_named() -> None:
    class Cached(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t, cache=object())[0]

    with pytest.raises(ValueError, match="Network is called with cache, of type object") as error:
        recorded(Cached)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [namedtuple("Pair", "a b")(1, 2), bytearray(3)])
def test_containers_that_cannot_be_kept_are_named(value: Any) -> None:
    class Odd(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t, more={"odd": value})[0]

    with pytest.raises(ValueError, match=f"Network is called with more/odd, of type {type(value).__name__}"):
        recorded(Odd)


@pytest.mark.parametrize("more", [{"a/b": 1, "a": {"b": 2}}, {1: 1, "1": 2}])
def test_inputs_that_have_one_name_are_refused(more: Any) -> None:
    class Twice(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t, more=more)[0]

    with pytest.raises(ValueError, match="Network is called with two inputs that are both more/"):
        recorded(Twice)


def test_numbers_of_numpy_are_numbers() -> None:
    class Numbered(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=np.int64(t), scale=np.float32(0.5))[0]

    found = recorded(Numbered)
    assert sorted(found.inputs["timestep"].tolist()) == sorted([750, 500, 250, 0] * 3)
    assert found.constants == {"scale": 0.5}


def test_every_kind_of_value_survives_the_disk(tmp_path: Path) -> None:
    class Varied(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            more = OrderedDict(
                complex=torch.complex(x, x + 1),
                deep=x.reshape(len(x), 2, 2, 2, 2, 1, 2),
                eighth=x.to(torch.float8_e4m3fn),
                words=["tensor:0", "tensor"],
                either=x[:, 0] if t > 300 else None,
            )
            return self.transformer(x, timestep=t, sample_weight=x[:, 1], more=more)[0]

    found = recorded(Varied)
    save_calibration_set(found, tmp_path / "set")
    again = load_calibration_set(tmp_path / "set")
    assert torch.equal(again.weights, found.weights)
    assert again.group_of is not None
    for group in again.group_of.unique():
        rows = (again.group_of == group).nonzero().flatten()
        one, expected = (s.batch(rows, torch.device("cpu")) for s in (again, found))
        assert type(one["more"]) is OrderedDict
        x, more = one["x"], one["more"]
        assert torch.equal(one["sample_weight"], x[:, 1])
        assert torch.equal(more["complex"], torch.complex(x, x + 1))
        assert torch.equal(more["deep"], x.reshape(len(x), 2, 2, 2, 2, 1, 2))
        assert torch.equal(more["eighth"].float(), x.to(torch.float8_e4m3fn).float())
        assert more["words"] == ["tensor:0", "tensor"]
        late = expected["timestep"] < 300
        assert late.all() or not late.any()
        assert more["either"] is None if late.all() else torch.equal(more["either"], x[:, 0])


def test_an_argument_of_which_the_first_call_tells_nothing_is_refused_by_its_name() -> None:
    class Later(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t, text=None if t > 700 else x[:, 0])[0]

    class Shifting(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t, text=x if t > 700 else x[:1, 0])[0]

    for kind in (Later, Shifting):
        with pytest.raises(ValueError, match="Network is called with another text later") as error:
            recorded(kind)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [2, 3])
def test_all_rows_of_an_image_get_the_timestep_that_its_call_shares(rows: int) -> None:
    class Frames(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            frames = torch.stack([x + 0.1 * k for k in range(rows)], 1).flatten(0, 1)
            return self.transformer(frames, timestep=t[None])[0].unflatten(0, (-1, rows)).mean(1)

    found = recorded(Frames)
    assert found.axes == {name: Axis("dim", 0, rows) for name in ("x", "timestep")}
    one = batch(found, [0, 1, 2])
    times = one["timestep"].reshape(3, rows)
    assert torch.equal(times, found.inputs["timestep"][:3])
    assert (times == times[:, :1]).all()
    assert set(found.inputs["timestep"].flatten().tolist()) == {750, 500, 250, 0}


@pytest.mark.parametrize("shape", [(), (1,), "number"])
def test_a_timestep_that_all_images_share_is_given_for_each_of_them(shape: Any) -> None:
    class Shared(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=float(t) if shape == "number" else t.reshape(shape))[0]

    found = recorded(Shared)
    times = found.inputs["timestep"].tolist()
    assert sorted(times) == sorted([750, 500, 250, 0] * 3)
    assert "timestep" not in found.constants
    mixed = [times.index(750), times.index(0)]
    assert batch(found, mixed)["timestep"].tolist() == [750, 0]


def test_an_argument_that_changes_its_floating_type_along_a_trajectory_is_kept_in_the_widest() -> None:
    class Narrowing(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            kind = torch.float32 if t == 750 else torch.bfloat16
            return self.transformer(x, timestep=t.to(kind).expand(len(x)))[0]

    times = recorded(Narrowing).inputs["timestep"]
    assert times.dtype == torch.float32
    rounded = torch.tensor([500.0, 250.0]).bfloat16().tolist()
    assert sorted(times.tolist()) == sorted([750.0, *rounded, 0.0] * 3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_network_that_reads_only_the_first_timestep_of_a_batch_gets_one_a_batch(batch_size: int) -> None:
    class First(Network):
        def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (self.layer(x) * (1 + timestep[0].float() / 1000),)

    class Shared(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t.reshape(1))[0]

    found = sample_trajectories(make(Shared, First()), SamplerConfig(steps=4, batch_size=batch_size), 12, seed=5)
    assert len(found.group_of.unique()) == 4
    for rows in found.chunks(torch.arange(12), 12):
        assert found.batch(rows, torch.device("cpu"))["timestep"].shape == (1,)


def test_what_varies_between_calls_and_cannot_be_given_for_each_image_keeps_calls_apart() -> None:
    class Stepped(Network):
        def forward(self, x: Tensor, timestep: Any, step: Any, name: str) -> tuple[Tensor]:
            assert isinstance(step, int)
            return (self.layer(x) * (1 + step),)

    class Counting(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t.expand(len(x)), step=int(t) // 250, name=f"at {int(t)}")[0]

    found = sample_trajectories(make(Counting, Stepped()), SAMPLER, 12)
    groups = found.group_of
    assert groups is not None
    assert len(groups.unique()) == 4
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        one = found.batch(rows, torch.device("cpu"))
        assert set(one["timestep"].tolist()) == {one["step"] * 250}
        assert one["name"] == f"at {one['step'] * 250}"


def test_prompts_of_several_lengths_are_sampled_one_by_one(tmp_path: Any) -> None:
    class Prompted(Pipeline):
        @torch.no_grad()
        def __call__(
            self, prompt: list[str], generator: list[torch.Generator], num_inference_steps: int, output_type: str = "np"
        ) -> ImagePipelineOutput:
            x = torch.stack([torch.randn(2, 4, 4, generator=g) for g in generator])
            length = max(map(len, prompt))
            text = torch.stack([torch.tensor([ord(c) for c in p.ljust(length, "~")]).float() for p in prompt])
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.transformer(x, timestep=t, text=text)[0], t, x).prev_sample
            return ImagePipelineOutput(images=x[:, :1].permute(0, 2, 3, 1).sigmoid().numpy())

    sampler = SamplerConfig(steps=4, batch_size=2, prompts=["ab", "abcdef", "xyz"])
    found = recorded(Prompted, 12, sampler)
    words = ["".join(chr(int(c)) for c in text) for text in found.inputs["text"]]
    assert sorted(words) == sorted(["ab", "abcdef", "xyz"] * 4)
    save_calibration_set(found, tmp_path / "set")
    again = load_calibration_set(tmp_path / "set")
    assert all(map(torch.equal, again.inputs["text"], found.inputs["text"]))
    assert torch.equal(again.group_of, found.group_of)
    assert len(found.group_of.unique()) == 3


# --- one sample a call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [("HeunDiscreteScheduler", 7), ("KDPM2DiscreteScheduler", 7), ("PNDMScheduler", 13), ("DDIMScheduler", 4)],
)
def test_the_set_covers_a_trajectory_from_its_first_to_its_last_call(scheduler: str, calls: int) -> None:
    found = sample_trajectories(make(), SamplerConfig(scheduler, steps=4, batch_size=2), 3 * calls, seed=5)
    spy, generators = make(), [torch.Generator().manual_seed(5)]
    spy.scheduler = getattr(diffusers, scheduler).from_config(spy.scheduler.config)
    spy(batch_size=1, generator=generators, num_inference_steps=4)
    expected = [float(call["timestep"]) for call in spy.transformer.calls]
    assert len(expected) == calls
    assert sorted(found.inputs["timestep"].float().tolist()) == sorted(expected * 3)
    states = [call["x"][0] for call in spy.transformer.calls]
    for state in states:
        assert min((x - state).abs().max().item() for x in found.inputs["x"]) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_guidance_in_separate_calls_gives_as_many_samples_as_asked_for(n: int) -> None:
    class Guided(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            with_, without = (self.transformer(x, timestep=t, text=torch.full((len(x), 2), k))[0] for k in (1.0, 0.0))
            return without + 3 * (with_ - without)

    found = recorded(Guided, n)
    assert len(found) == len(found.inputs["x"]) == n
    if n > 8:
        assert set(found.inputs["text"].flatten().tolist()) == {0.0, 1.0}


def test_calls_with_other_arguments_are_left_out_with_a_line() -> None:
    class Skipping(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            if t < 400:
                self.transformer(x, timestep=t, skip_layers=[1])
            return self.transformer(x, timestep=t)[0]

    with pytest.warns(UserWarning, match="skip_layers"):
        found = recorded(Skipping)
    assert "skip_layers" not in batch(found, [0, 1])
    assert sorted(found.inputs["timestep"].tolist()) == sorted([750, 500, 250, 0] * 3)


def test_a_set_that_would_end_before_its_trajectory_is_refused() -> None:
    class Remembering(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            return self.transformer(x, timestep=t, memory={} if t > 300 else {"last": x})[0]

    with (
        pytest.warns(UserWarning, match="memory/last"),
        pytest.raises(ValueError, match=r"other arguments at the end of a trajectory .*memory/last"),
    ):
        recorded(Remembering)


def test_nan_in_the_last_guided_call_is_refused() -> None:
    class Failing(Network):
        def forward(self, x: Tensor, timestep: Any) -> tuple[Tensor]:
            return (super().forward(x, timestep)[0] * (torch.nan if timestep == 0 else 1),)

    class Guided(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            with_, without = self.transformer(torch.cat([x, x / 2]), timestep=t)[0].chunk(2)
            return without + 3 * (with_ - without)

    with pytest.raises(ValueError, match="NaN or Inf along its trajectories") as error:
        sample_trajectories(make(Guided, Failing()), SAMPLER, 8, weighting="sensitivity")
    assert "\n" not in str(error.value)


def test_a_network_that_keeps_a_state_is_refused() -> None:
    class Counting(Network):
        def forward(self, x: Tensor, timestep: Any) -> tuple[Tensor]:
            self.count = getattr(self, "count", 0) + 1
            return (super().forward(x, timestep)[0] * (1 + self.count),)

    with pytest.raises(ValueError, match=r"different outputs for the same arguments.*a state") as error:
        sample_trajectories(make(Pipeline, Counting()), SAMPLER, 8)
    assert "\n" not in str(error.value)


def test_a_network_that_its_pipeline_changes_while_it_samples_is_warned_of() -> None:
    class Louder(Network):
        gain = 1.0

        def forward(self, x: Tensor, timestep: Any) -> tuple[Tensor]:
            return (super().forward(x, timestep)[0] * self.gain,)

    class Changing(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            self.transformer.gain = 2.0
            output = super().predict(x, t)
            self.transformer.gain = 1.0
            return output

    with pytest.warns(UserWarning, match="something else for the arguments of its last call"):
        sample_trajectories(make(Changing, Louder()), SAMPLER, 8)


def test_a_number_of_calls_that_varies_is_refused() -> None:
    class Restless(Pipeline):
        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            if x[0, 0, 0, 0] > 0:
                self.transformer(x, timestep=t)
            return self.transformer(x, timestep=t)[0]

    with pytest.raises(ValueError, match=r"times along one trajectory|times in the first step"):
        recorded(Restless, 60)


def test_what_will_be_calibrated_is_said_before() -> None:
    said: list[str] = []
    pipeline = make()
    sample_trajectories(
        pipeline, SAMPLER, 12, on_plan=lambda text: said.append(f"{len(pipeline.transformer.calls)} {text}")
    )
    (line,) = said
    assert line.startswith("2 Network with 12 samples")  # after the first steps that are compared, before all others
    assert "DDIMScheduler: 4 calls a trajectory, timesteps 750 to 0" in line


# --- attention processors of a call --------------------------------------------------------------------------------


class OwnAttention:
    """Takes any batch."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True) + x


class PerturbedAttention(OwnAttention, nn.Module):
    """Takes batches of three guidance passes, and leaves attention out of the last of them."""

    def __call__(self, x: Tensor) -> Tensor:
        first, second, last = x.chunk(3)
        return torch.cat([super().__call__(first), super().__call__(second), last])


class AttentiveNetwork(Network):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.processor = OwnAttention()

    def forward(self, x: Tensor, timestep: Any, **other: Any) -> tuple[Tensor]:
        return super().forward(self.attention.processor(x), timestep, **other)


class PerturbedGuidance(Pipeline):
    """Gives its network another processor for the time of a call."""

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        first, second, last = self.transformer(torch.cat([x, 2 * x, 2 * x]), timestep=t)[0].chunk(3)
        return first + 3 * (second - first) + 2 * (second - last)

    @functools.wraps(Pipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> ImagePipelineOutput:
        own, self.transformer.attention.processor = self.transformer.attention.processor, PerturbedAttention()
        found = super().__call__(*args, **kwargs)
        del self.transformer.attention.processor
        self.transformer.attention.processor = own
        return found


def test_a_network_whose_pipeline_changes_its_attention_is_calibrated_with_its_own() -> None:
    pipeline = make(PerturbedGuidance, AttentiveNetwork())
    own = pipeline.transformer.attention.processor
    said = r"gives AttentiveNetwork other attention processors while it samples \(PerturbedAttention\)"
    with pytest.warns(UserWarning, match=said) as warned:
        found = sample_trajectories(pipeline, SAMPLER, 12, seed=5, weighting="sensitivity")
    assert len(warned) == 1
    assert pipeline.transformer.attention.processor is own
    arguments = batch(found, [0])
    expected = pipeline.transformer.layer(own(arguments["x"])) + arguments["timestep"].reshape(-1, 1, 1, 1) / 1000
    assert torch.equal(pipeline.transformer(**arguments)[0], expected)
    assert len(found.weights.unique()) > 3  # a pass of each weight at each step


def test_processors_that_a_pipeline_does_not_change_are_not_spoken_of(recwarn: pytest.WarningsRecorder) -> None:
    pipeline = make(network=AttentiveNetwork())
    pipeline.transformer.attention.processor = Unhashable()
    sample_trajectories(pipeline, SAMPLER, 4)
    assert not recwarn.list


class Unhashable(OwnAttention):
    __hash__ = None  # as of a data class


def test_an_error_within_a_call_leaves_a_network_its_processors() -> None:
    pipeline = make(PerturbedGuidance, AttentiveNetwork())
    own = pipeline.transformer.attention.processor
    pipeline.transformer.layer.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(pipeline, SAMPLER, [0])
    assert pipeline.transformer.attention.processor is own


# --- weights -------------------------------------------------------------------------------------------------------


class OneFrame(Pipeline):
    """Gives the scheduler what is predicted beyond a frame that it was given: nothing."""

    def __call__(
        self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int = 5
    ) -> ImagePipelineOutput:
        x = torch.stack([torch.randn(2, 4, 4, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            beyond = self.predict(x, t)[:, :, 4:]
            self.scheduler.step(beyond, t, beyond)
        return ImagePipelineOutput(images=x[:, :1].permute(0, 2, 3, 1).numpy())


@pytest.mark.filterwarnings("ignore:std:UserWarning")
def test_samples_weigh_alike_with_a_line_where_the_sensitivity_comes_out_as_nan() -> None:
    with pytest.warns(UserWarning, match="DDIMScheduler passes errors on cannot be measured") as warned:
        found = sample_trajectories(make(OneFrame), SAMPLER, 8, weighting="sensitivity")
    assert len([w for w in warned if "weigh alike" in str(w.message)]) == 1
    assert torch.equal(found.weights, torch.ones(8))


def test_samples_weigh_alike_if_the_sensitivity_of_one_step_alone_cannot_be_measured() -> None:
    class Brittle(DDIMScheduler):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            if int(timestep) == 250 and model_output.dtype == torch.float32:
                raise RuntimeError("no float32 here")
            return super().step(model_output, timestep, sample, **options)

    pipeline = make()
    pipeline.scheduler = Brittle.from_config(pipeline.scheduler.config)
    pipeline.transformer.double()
    pipeline.predict = lambda x, t: pipeline.transformer(x.double(), timestep=t)[0]
    with pytest.warns(UserWarning, match="no float32 here"):
        found = sample_trajectories(pipeline, SAMPLER, 8, weighting="sensitivity")
    assert torch.equal(found.weights, torch.ones(8))


@pytest.mark.parametrize("weighting", ["uniform", "sensitivity"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_whose_last_output_alone_is_not_finite_is_refused(weighting: Any, value: float) -> None:
    pipeline = make()
    pipeline.transformer.forward = lambda x, timestep: (x if timestep else torch.full_like(x, value),)
    with pytest.raises(ValueError, match="NaN or Inf along its trajectories") as error:
        sample_trajectories(pipeline, SAMPLER, 8, weighting=weighting)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:std:UserWarning")
def test_the_sensitivity_of_a_single_value_is_that_of_many() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    one, many = (
        output_sensitivity(scheduler, (torch.ones(1, n, 1, 1), scheduler.timesteps[1], torch.ones(1, n, 1, 1)), {})
        for n in (1, 9)
    )
    assert one.item() == pytest.approx(many.item(), rel=1e-3)


def test_steps_and_scheduler_are_the_pipelines_own_unless_others_are_asked_for() -> None:
    found = sample_trajectories(make(), SamplerConfig(batch_size=2), 10)
    assert sorted(set(found.inputs["timestep"].tolist())) == [0, 200, 400, 600, 800]


@pytest.mark.parametrize("seed", [-3, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    a, b = (sample_trajectories(make(), SAMPLER, 8, seed=s) for s in (seed, seed + 2**64))
    assert torch.equal(a.inputs["x"], b.inputs["x"])
    batches = list(UnitBatches(seed, 0, n=8, batch_size=4, steps=3))
    assert torch.equal(batches[0], next(iter(UnitBatches(seed + 2**64, 0, n=8, batch_size=4, steps=3))))


def test_samples_of_a_network_that_gives_zeros_weigh_alike() -> None:
    pipeline = make()
    pipeline.transformer.forward = lambda x, timestep: (torch.zeros_like(x),)
    found = sample_trajectories(pipeline, SAMPLER, 8, weighting="sensitivity")
    assert found.weights.isfinite().all()
    assert found.weights.mean().item() == pytest.approx(1)


def test_samples_of_several_shapes_are_refused_on_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CalibrationDataModule(n_samples=4)
    inputs = {"x": [torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2)]}
    data._sets = {"unet": CalibrationSet(inputs, torch.ones(4))}
    assert len(data.local_set("unet")) == 4
    monkeypatch.setattr("fpq_lightning.utils.distributed.world_size", lambda: 2)
    data._batch_size = 2
    with pytest.raises(ValueError, match="samples of several shapes") as error:
        data.local_set("unet")
    assert "\n" not in str(error.value)
