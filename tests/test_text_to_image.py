"""Prompts, guidance and nested arguments: pipelines that are conditioned on text."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CHECKOUT, fit_arguments, run_fpq, tiny_text_to_image
from PIL import Image
from torch import Tensor

from fpq_lightning import AttentionRecipe, CalibrationDataModule, Recipe, RoundingRecipe, load_quantized, quantize
from fpq_lightning.calibration.axes import collapsed
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.disk import load_calibration_set, save_calibration_set
from fpq_lightning.calibration.recorder import guidance_shares
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.calibration.trajectories import sample_trajectories
from fpq_lightning.diffusion.pipelines import load_pipeline, pipeline_class
from fpq_lightning.diffusion.prompts import load_prompts
from fpq_lightning.diffusion.sampling import SamplerConfig, sample, set_sampler, warn_of_long_prompts
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import discover_units
from fpq_lightning.nn.attention import quantized_attention
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.convert import make_attention_plain, make_quantized
from fpq_lightning.quantization.quantizer import Granularity

COCO = CHECKOUT.parent / "shared" / "data" / "prompts" / "coco_30k.csv"
PROMPTS = ["a cat", "two dogs on the grass", "big red bus"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_text_to_image(tmp_path_factory.mktemp("model") / "tiny")


# --- prompts ---------------------------------------------------------------------------------------------------

AWKWARD = ["one, with a comma", 'a "quoted" one', "two\nlines"]


@pytest.mark.parametrize("kind", ["list", "csv", "tsv", "jsonl", "parquet", "disk", "CSV", "JSONL", "Parquet"])
def test_prompts_survive_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"id": [1, 2, 3], "Caption": AWKWARD})
    if kind == "list":
        assert load_prompts(AWKWARD) == AWKWARD
        return
    file = tmp_path / f"prompts.{kind}"
    {
        "csv": lambda: dataset.to_csv(file, index=False),
        "tsv": lambda: dataset.to_csv(file, index=False, sep="\t"),
        "parquet": lambda: dataset.to_parquet(file),
        "disk": lambda: dataset.save_to_disk(str(file)),
        "jsonl": lambda: dataset.to_json(file),
    }[kind.lower()]()
    assert load_prompts(file) == load_prompts(str(file)) == load_prompts(str(file), "Caption") == AWKWARD


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    assert load_prompts(str(tmp_path / "a.txt")) == ["a cat", "a dog"]
    (tmp_path / "b.TXT").write_bytes("a cat\u2028and\x85a\x0cdog\r\na bird".encode())
    assert load_prompts(str(tmp_path / "b.TXT")) == ["a cat\u2028and\x85a\x0cdog", "a bird"]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_prompts_are_read_in_every_encoding_of_unicode(encoding: str, tmp_path: Path) -> None:
    prompts = ["a café in Zürich", "🐱 … “quoted”"]
    (tmp_path / "a.txt").write_bytes("\r\n".join(prompts).encode(encoding))
    (tmp_path / "a.csv").write_bytes("\n".join(["prompt", *prompts]).encode(encoding))
    (tmp_path / "a.jsonl").write_bytes("\n".join(json.dumps({"prompt": p}) for p in prompts).encode(encoding))
    for kind in ("txt", "csv", "jsonl"):
        assert load_prompts(str(tmp_path / f"a.{kind}")) == prompts


def test_a_file_that_is_not_unicode_is_read_as_cp1252_which_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a café … “quoted”".encode("cp1252"))
    with pytest.warns(UserWarning, match=r"a\.txt is not UTF-8: read as cp1252"):
        assert load_prompts(str(tmp_path / "a.txt")) == ["a café … “quoted”"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"a \x81\x8d", "no text in UTF-8, UTF-16 or cp1252: save it as UTF-8"),
        ("a.txt", b"a cat\0 and more of it", "holds zero bytes and is no UTF-16"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', "a.jsonl cannot be read"),
        ("a.jsonl", b'"a cat"', "row 1 of .* is no JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"id": 3}', "prompt 2 of .* is empty"),
        ("a.jsonl", b'{"prompt": ["a"]}', "prompt 1 of .* is no text but list"),
        ("a.jsonl", b"", "holds no prompts"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read"),
        ("a.md", b"a cat", "is no file of prompts: give .txt, .csv"),
    ],
)
def test_damaged_files_of_prompts_are_one_clear_line(name: str, contents: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message) as found:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet", "disk"])
def test_edited_prompts_are_read_again(kind: str, tmp_path: Path) -> None:
    for prompts in (["a cat", "a dog"], ["a car", "a bus"]):  # of the same sizes
        file, dataset = tmp_path / f"a.{kind}", datasets.Dataset.from_dict({"prompt": prompts})
        {
            "txt": lambda file, _, prompts=prompts: file.write_text("\n".join(prompts)),
            "csv": lambda file, dataset: dataset.to_csv(file, index=False),
            "jsonl": lambda file, dataset: dataset.to_json(file),
            "parquet": lambda file, dataset: dataset.to_parquet(file),
            "disk": lambda file, dataset: dataset.save_to_disk(str(file)),
        }[kind](file, dataset)
        assert load_prompts(str(file)) == prompts
        load_prompts(str(file)).clear()  # which is the caller's own
        assert load_prompts(str(file)) == prompts


def test_a_text_with_spaces_that_names_nothing_is_itself_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for prompt in ("a photo of a cat", "a cat. In the style of e.g. Monet", "a\ncat", "a cat, " * 2000, "{a} [b: c"):
        assert load_prompts(prompt) == [prompt]
        assert SamplerConfig(prompts=prompt).prompts_of([0, 5]) == [prompt] * 2
    (tmp_path / "my prompts.txt").write_text("a dog")
    assert load_prompts("my prompts.txt") == ["a dog"]
    datasets.Dataset.from_dict({"prompt": ["a bird"]}).save_to_disk("my prompts")
    assert load_prompts("my prompts") == ["a bird"]
    for missing in ("other prompts.txt", "prompts.txt", "./my other prompts", "/my/other prompts", "~/my prompts"):
        with pytest.raises(FileNotFoundError):
            load_prompts(missing)
    for nothing in ("", " "):
        with pytest.raises(ValueError, match="empty"):
            load_prompts(nothing)


@pytest.mark.skipif(not COCO.is_file(), reason="the captions are not beside the checkout")
def test_coco_captions_are_read_whole() -> None:
    prompts = load_prompts(str(COCO))
    assert len(prompts) == 30_000
    assert prompts[0] == "A bicycle replica with a clock as the front wheel."


@pytest.mark.parametrize(
    ("text", "column", "error", "message"),
    [
        (None, None, FileNotFoundError, "no file of prompts"),
        ("id,caption\n", None, ValueError, "holds no prompts"),
        ("id,caption\n1,a cat\n2,\n", None, ValueError, "prompt 2 of .* is empty"),
        ("id,words\n1,a cat\n", None, ValueError, "none of the columns prompt, caption, text"),
        ("id,caption\n1,a cat\n", "words", ValueError, "no column 'words'; it has id, caption"),
    ],
)
def test_unusable_prompts_are_one_clear_line(
    text: str | None, column: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.csv"
    if text is not None:
        file.write_text(text)
    sampler = SamplerConfig(prompts=str(file), prompt_column=column)
    with pytest.raises(error, match=message) as found:
        sampler.check()
    assert "\n" not in str(found.value)


def test_a_second_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_bytes("\ufeffprompt\r\na cat\r\n".encode("utf-16"))  # which writes one of its own
    assert load_prompts(file) == ["a cat"]


def test_prompts_may_be_an_array() -> None:
    assert load_prompts(np.array(["a cat", "a dog"])) == ["a cat", "a dog"]  # type: ignore[arg-type]


def test_a_seed_always_has_the_same_prompt(model: str) -> None:
    sampler = SamplerConfig(steps=2, prompts=PROMPTS)
    assert sampler.prompts_of([0, 4, 5, 3]) == ["a cat", PROMPTS[1], PROMPTS[2], "a cat"]
    pipeline = load_pipeline(model)
    set_sampler(pipeline, sampler)
    both = sample(pipeline, sampler, [4, 5])
    alone = sample(pipeline, SamplerConfig(steps=2), [5], [PROMPTS[2]])
    other = sample(pipeline, SamplerConfig(steps=2), [5], ["something else"])
    assert torch.allclose(both[1:], alone, atol=1e-4)
    assert not torch.allclose(both[1:], other, atol=1e-3)


def test_the_identity_of_a_sampler_knows_its_prompts_and_not_where_they_lie(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(PROMPTS))
    (tmp_path / "c.txt").write_text("\n".join(PROMPTS[:2]))
    a, b, c = (SamplerConfig(prompts=str(tmp_path / name)).identity() for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b == SamplerConfig(prompts=PROMPTS, batch_size=3).identity()
    assert a != c
    assert a != SamplerConfig(prompts=PROMPTS, negative_prompt="blurry").identity()


def test_a_text_pipeline_without_prompts_is_one_clear_line(model: str) -> None:
    with pytest.raises(ValueError, match=r"give prompts with --sampler\.prompts"):
        sample(load_pipeline(model), SamplerConfig(steps=2), [0])


# --- nested arguments ------------------------------------------------------------------------------------------

_names = st.text("abc_", min_size=1, max_size=3)
_leaves = st.integers() | st.none() | st.booleans() | st.text(max_size=3)
_trees = st.recursive(
    _leaves,
    lambda child: (
        st.dictionaries(_names | st.integers(0, 20), child, max_size=3)
        | st.lists(child, max_size=3)
        | st.lists(child, max_size=3).map(tuple)
    ),
)


@given(st.dictionaries(_names, _trees, min_size=1, max_size=4))
def test_arguments_come_back_as_they_were_from_the_disk_too(arguments: dict[str, Any]) -> None:
    structure, leaves = collapsed(arguments, {})
    made = CalibrationSet({"x_y_z": torch.zeros(2)}, torch.ones(2), leaves, {}, {**structure, "x_y_z": "x_y_z"})
    with tempfile.TemporaryDirectory() as directory:
        save_calibration_set(made, f"{directory}/set")
        for found in (made, load_calibration_set(f"{directory}/set")):
            batch = found.batch(slice(0, 1), torch.device("cpu"))
            assert batch.pop("x_y_z").tolist() == [0]
            assert repr(batch) == repr(arguments)  # which tells tuples from lists and 1 from True


def test_a_set_with_nested_arguments_survives_the_disk(tmp_path: Path) -> None:
    inputs = {"sample": torch.randn(5, 2), "added_cond_kwargs/time_ids": torch.randn(5, 6)}
    constants = {"added_cond_kwargs/flag": True, "ids/0": torch.arange(3), "ids/1": torch.ones(2), "return_dict": False}
    save_calibration_set(CalibrationSet(inputs, torch.ones(5), constants), tmp_path / "set")
    found = load_calibration_set(tmp_path / "set").batch(slice(1, 3), torch.device("cpu"))
    assert found.keys() == {"sample", "added_cond_kwargs", "ids", "return_dict"}
    assert torch.equal(found["added_cond_kwargs"]["time_ids"], inputs["added_cond_kwargs/time_ids"][1:3])
    assert found["added_cond_kwargs"]["flag"] is True
    assert [x.tolist() for x in found["ids"]] == [[0, 1, 2], [1, 1]]


# --- guidance --------------------------------------------------------------------------------------------------


@given(scale=st.floats(1.5, 20), seed=st.integers(0, 100))
def test_the_shares_of_the_passes_are_those_of_guidance(scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    without, with_ = (torch.randn(3, 4, 5, generator=draw) for _ in range(2))
    combined = without + scale * (with_ - without)
    assert guidance_shares([without, with_], combined).tolist() == pytest.approx([scale - 1, scale], rel=1e-3)


def test_shares_look_only_at_what_is_not_a_variance_and_one_pass_is_all() -> None:
    outputs = [torch.randn(2, 8, 3), torch.randn(2, 8, 3)]
    combined = -2 * outputs[0][:, :4] + 3 * outputs[1][:, :4]
    assert guidance_shares(outputs, combined).tolist() == pytest.approx([2, 3], rel=1e-4)
    assert guidance_shares(outputs[:1], combined).tolist() == [1]


def _calls(model: str, sampler: SamplerConfig, seeds: range) -> list[dict[str, Tensor]]:
    """What the denoiser is called with, in the order of calls."""
    pipeline = load_pipeline(model)
    set_sampler(pipeline, sampler)
    found: list[dict[str, Tensor]] = []

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        found.append({"sample": args[0].clone(), "text": kwargs["encoder_hidden_states"].clone()})

    handle = pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
    sample(pipeline, sampler, seeds)
    handle.remove()
    return found


def test_the_weight_of_a_sample_holds_the_share_of_its_pass_of_guidance(model: str) -> None:
    """An error of the unconditional pass goes into the image times 1 - g, one of the conditional pass times g."""
    guidance = 3.0
    sampler = SamplerConfig(steps=4, batch_size=3, guidance_scale=guidance, prompts=PROMPTS)
    found = sample_trajectories(load_pipeline(model), sampler, 12, seed=6, weighting="sensitivity")
    (without,) = _calls(model, SamplerConfig(steps=1, guidance_scale=guidance, prompts=PROMPTS), range(1))
    unconditional = torch.isclose(found.inputs["encoder_hidden_states"], without["text"][0], atol=1e-5).all(-1).all(-1)
    assert unconditional.sum() == 6
    for timestep in found.inputs["timestep"].unique():
        at_step = found.inputs["timestep"] == timestep
        of_pass = [found.weights[at_step & mask].mean().item() for mask in (unconditional, ~unconditional)]
        assert of_pass[1] / of_pass[0] == pytest.approx((guidance / (1 - guidance)) ** 2, rel=0.01)


def test_passes_of_perturbed_attention_guidance_weigh_as_in_its_sum_and_stand_alone(model: str) -> None:
    """It is u + g (c - u) + s (c - p) of the unconditional, conditional and perturbed pass."""
    pipeline = load_pipeline(model, kind=pipeline_class("StableDiffusionPAGPipeline"))
    sampler = SamplerConfig(steps=4, batch_size=3, guidance_scale=3.0, prompts=PROMPTS, arguments={"pag_scale": 4.0})
    with pytest.warns(UserWarning, match=r"\(PAGCFGIdentitySelfAttnProcessor2_0\): all of its guidance passes"):
        found = sample_trajectories(pipeline, sampler, 12, seed=6, weighting="sensitivity")
    for timestep in found.inputs["timestep"].unique():
        weights = found.weights[found.inputs["timestep"] == timestep].sort().values
        assert (weights / weights[0]).tolist() == pytest.approx([1, (4 / 2) ** 2, (7 / 2) ** 2], rel=0.01)
    one, three = (pipeline.unet(**found.batch(slice(0, n), torch.device("cpu")))[0] for n in (1, 3))
    assert torch.allclose(one[0], three[0], atol=1e-4)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_set_holds_both_passes_of_guidance_with_their_own_text(model: str, guidance: float) -> None:
    sampler = SamplerConfig(steps=4, batch_size=3, guidance_scale=guidance, prompts=PROMPTS)
    found = sample_trajectories(load_pipeline(model), sampler, 12, seed=6, weighting="sensitivity")
    calls = _calls(model, sampler, range(6, 9))
    assert len(calls) == 4
    passes = 2 if guidance > 1 else 1
    rows = {
        (step, row): (call["sample"][row], call["text"][row])
        for step, call in enumerate(calls)
        for row in range(3 * passes)
    }
    matched = []
    for state, text in zip(found.inputs["sample"], found.inputs["encoder_hidden_states"], strict=True):
        matched += [
            key
            for key, (s, t) in rows.items()
            if torch.allclose(s, state, atol=1e-4) and torch.allclose(t, text, atol=1e-4)
        ]
    assert len(matched) == 12
    assert len(set(matched)) == 12
    by_pass = [sum(row // 3 == i for _, row in matched) for i in range(passes)]
    assert by_pass == [12 // passes] * passes
    assert {(step, row % 3) for step, row in matched} == {(step, row) for step in range(4) for row in range(3)}
    assert found.weights.mean().item() == pytest.approx(1)
    assert len(found.weights.unique()) > 1
    assert not found.constants.get("added_cond_kwargs/text_embeds")


def test_prompts_lie_in_the_store_once_for_all_units_and_no_longer_than_needed(model: str) -> None:
    pipeline = load_pipeline(model)
    sampler = SamplerConfig(steps=3, batch_size=2, guidance_scale=3, prompts=PROMPTS)
    calibration = sample_trajectories(pipeline, sampler, 6)
    unet = pipeline.unet.requires_grad_(False)
    units, _ = trace_units(unet, discover_units(unet), calibration.batch(slice(0, 1), torch.device("cpu")))
    for unit in units:
        for layer in unit.layers.values():
            make_quantized(layer, Granularity("channel"))
    store = ActivationStore(torch.device("cpu"))
    replay = NetworkReplay(unet, units, calibration, store, micro_batch=4)
    text = calibration.inputs["encoder_hidden_states"]
    reading = []
    for i, unit in enumerate(units):
        replay.capture()
        captured: list[Tensor | None] = []
        handle = unit.module.register_forward_pre_hook(
            lambda _, args, kwargs, captured=captured: captured.append(kwargs.get("encoder_hidden_states")),
            with_kwargs=True,
        )
        replay.call(replay.inputs(torch.tensor([4, 1])))
        handle.remove()
        if captured[0] is not None:
            reading.append(i)
            assert torch.equal(captured[0], text[[4, 1]])
        copies = [key for key, entry in store._entries.items() if entry.shape[2:] == text.shape[1:]]
        assert copies in ([], ["condition.encoder_hidden_states@0"])
        assert copies or captured[0] is None
        replay.advance()
    assert len(reading) >= 2
    assert not store.holds("condition.encoder_hidden_states@0")
    store.close()


# --- whole runs ------------------------------------------------------------------------------------------------


def test_a_text_to_image_model_is_quantized_judged_and_used(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = [f"--sampler.prompts={tmp_path / 'prompts.txt'}", "--sampler.guidance_scale=3"]
    command = fit_arguments(model, tmp_path / "run", iterations=4, n_images=4)
    outcome = run_fpq(capsys, [*command, *options])
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["quantized_share"] > 0.95
    assert report["variants"]["quantized"]["psnr"] > 5
    assert "down_blocks.0.attentions.0+down_blocks.0.downsamplers.0" in {b["name"] for b in report["blocks"]}
    command = ["test", f"--model={tmp_path / 'run' / 'quantized'}", f"--output={tmp_path / 'test'}", *options]
    again = run_fpq(capsys, [*command, "--sampler.steps=4", "--evaluation.n_images=4", "--trainer.accelerator=cpu"])
    assert again.code == 0, again.err
    found = json.loads((tmp_path / "test" / "report.json").read_text())["variants"]["quantized"]
    assert found["psnr"] == pytest.approx(report["variants"]["quantized"]["psnr"], abs=0.3)


def test_prompts_that_no_tokenizer_takes_whole_are_counted(model: str) -> None:
    pipeline = load_pipeline(model)  # 16 tokens, two of them for start and end
    exact, long = "abcdefghijklmn", "abcdefghijklmno"
    with pytest.warns(UserWarning, match=f"1 of 2 prompts have more than the 16 tokens .* first one '{long}'"):
        warn_of_long_prompts(pipeline, [exact, long, long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_prompts(pipeline, [exact])
        second = copy.deepcopy(pipeline.tokenizer)
        second.model_max_length = 20  # of a second encoder, which sees it whole
        both = SimpleNamespace(components={"tokenizer": pipeline.tokenizer, "tokenizer_2": second})
        warn_of_long_prompts(both, [long])  # type: ignore[arg-type]


def test_a_calibration_says_that_prompts_are_cut(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--sampler.prompts=['{'a' * 20}']", "--recipe.include=['conv_in']"]
    with pytest.warns(UserWarning, match="1 of 1 prompts have more than the 16 tokens"):
        outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run", iterations=1), *options])
    assert outcome.code == 0, outcome.err


def test_attention_of_a_text_to_image_model_is_quantized_saved_and_opened(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(model)
    sampler = SamplerConfig(steps=4, batch_size=4, prompts=PROMPTS, guidance_scale=3)
    recipe = Recipe(
        attention=AttentionRecipe("fp8"),
        rounding=RoundingRecipe(start="nearest", learned=True, iterations=4, batch_size=4),
    )
    data = CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8)
    quantize(pipeline, recipe, tmp_path / "run", data, sampler, base_model="tiny", accelerator="cpu")
    again = load_quantized(tmp_path / "run" / "quantized")
    names = {name for name, m in again.unet.named_modules() if name.endswith((".attn1", ".attn2"))}
    assert quantized_attention(again.unet).keys() == quantized_attention(pipeline.unet).keys() == names
    for opened in (pipeline, again):
        set_sampler(opened, sampler)
    expected = sample(pipeline, sampler, range(4))
    assert torch.equal(sample(again, sampler, range(4)), expected)
    for module in quantized_attention(again.unet).values():
        make_attention_plain(module)
    assert not torch.equal(sample(again, sampler, range(4)), expected)


def test_fit_without_prompts_ends_in_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_fpq(capsys, fit_arguments(model, tmp_path / "run", iterations=4))
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert "--sampler.prompts" in outcome.errors[0]


# --- other components ------------------------------------------------------------------------------------------


def _fit_with_components(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], components: dict[str, str]
) -> tuple[Path, dict[str, Any]]:
    options = [f"--sampler.prompts={PROMPTS}", f"--recipe.components={json.dumps(components)}"]
    options += ["--recipe.include=['conv_in']", "--sampler.guidance_scale=3"]
    options += [f"--evaluation.images={tmp_path / 'images'}"]  # shared: of other components they are not the same
    run = tmp_path / f"run{len(components)}"
    outcome = run_fpq(capsys, [*fit_arguments(model, run, iterations=2, n_images=4), *options])
    assert outcome.code == 0, outcome.err
    return run, json.loads((run / "report.json").read_text())


def test_text_encoder_and_vae_are_rounded_to_the_best_grid_of_each_channel(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, report = _fit_with_components(model, tmp_path, capsys, {"text_encoder": "e2m1", "vae": "fp8"})
    saved, base = load_pipeline(run / "quantized"), load_pipeline(model)
    for name, values in (("text_encoder", 15), ("vae", 255)):
        before, after = (dict(getattr(p, name).named_modules()) for p in (base, saved))
        layers = [key for key, module in before.items() if is_quantizable(module)]
        assert len(layers) >= 6
        for key in layers:
            w, q = before[key].weight.flatten(1), after[key].weight.flatten(1)
            assert not torch.equal(w, q)
            assert all(len(row.unique()) <= values for row in q)
            largest = w.abs().amax(1, keepdim=True)
            if name == "text_encoder":  # no clip of a brute-force search is better than the one that was found
                grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
                grid = torch.cat([-grid, grid])
                for share in torch.linspace(0.3, 1.2, 91):
                    scale = largest * share / 6
                    tried = grid[(w[..., None] / scale[..., None] - grid).abs().argmin(-1)] * scale
                    assert ((q - w).square().sum(1) <= (tried - w).square().sum(1) * 1.02 + 1e-12).all()
    # What else is there stays as it was.
    for key, value in base.text_encoder.state_dict().items():
        if "embedding" in key or "norm" in key:
            assert torch.equal(saved.text_encoder.state_dict()[key], value)
    without = _fit_with_components(model, tmp_path, capsys, {})[1]
    assert report["variants"]["nearest"]["psnr"] < without["variants"]["nearest"]["psnr"]
    assert report["variants"]["full_precision"] == without["variants"]["full_precision"]


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"text_encoder_2": "fp8"}, "text_encoder_2, which the pipeline lacks: it has vae, text_encoder"),
        ({"unet": "fp8"}, "unet, which the pipeline lacks"),
        ({"vae": "fp9"}, "unknown format 'fp9'"),
    ],
)
def test_components_that_cannot_be_quantized_end_in_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], components: dict[str, str], message: str
) -> None:
    options = [f"--sampler.prompts={PROMPTS}", f"--recipe.components={json.dumps(components)}"]
    outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run"), *options])
    assert outcome.code != 0
    assert message in outcome.err
    assert not (tmp_path / "run" / "calibration").exists()


def test_the_class_that_a_model_is_fitted_as_serves_predict_and_both_models_of_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_text_to_image(tmp_path / "tiny")
    images = [Image.effect_noise((16, 16), 40 + i).convert("RGB") for i in range(3)]
    datasets.Dataset.from_dict({"image": images}).save_to_disk(tmp_path / "images")
    options = ["--pipeline=StableDiffusionImg2ImgPipeline", f"--sampler.inputs={tmp_path / 'images'}"]
    options += ["--sampler.prompts=['a cat']", "--recipe.include=['conv_in']"]
    outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run", iterations=2), *options])
    assert outcome.code == 0, outcome.err
    quantized = f"--model={tmp_path / 'run' / 'quantized'}"
    output = f"--output={tmp_path / 'test'}"
    outcome = run_fpq(capsys, ["test", quantized, output, "--evaluation.n_images=2", "--trainer.accelerator=cpu"])
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "test" / "report.json").read_text())
    assert report["variants"]["quantized"]["psnr"] > 10
    output = f"--output={tmp_path / 'predict'}"
    for chosen in (quantized, f"--model={model}"):
        words = ["predict", chosen, output, "--n_images=1", "--trainer.accelerator=cpu"]
        outcome = run_fpq(capsys, words if chosen == quantized else [*words, *options[:3], "--sampler.steps=2"])
        assert outcome.code == 0, outcome.err
