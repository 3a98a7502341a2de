"""`report.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fpq_lightning.diffusion.media import IMAGE, LATENT
from fpq_lightning.evaluation.metrics import METRICS, Column, table_columns
from fpq_lightning.nn.coverage import Coverage


def _formats(chosen: dict[str, list[str]]) -> str:
    counts = Counter(name for names in chosen.values() for name in names)
    return ", ".join(f"{name} x{n}" for name, n in counts.most_common()) or "full precision"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def variant_label(name: str) -> str:
    """What a variant is called in reports."""
    return "nearest rounding" if name == "nearest" else name.replace("_", " ")


def _measured(variants: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {key for values in variants.values() for key, value in values.items() if value is not None}


def variant_rows(variants: Mapping[str, Mapping[str, Any]]) -> tuple[list[Column], list[list[str]]]:
    """The columns of the table of image quality, and its rows: variant, a cell for each column, number of images."""
    columns = table_columns(_measured(variants))
    rows = []
    for name, values in variants.items():
        label = "full precision, other seeds (noise floor)" if name == "full_precision" else variant_label(name)
        broken = f" ({values['not_finite']} not finite)" if values.get("not_finite") else ""
        cells = [column.cell(values.get(column.key)) for column in columns]
        rows.append([label, *cells, f"{values['n_images']}{broken}"])
    return columns, rows


def variants_table(variants: Mapping[str, Mapping[str, Any]], medium: str = "image") -> str:
    """The Markdown table of quality by variant.

    Args:
        variants: their numbers by key.
        medium: what was compared.
    """
    columns, rows = variant_rows(variants)
    header = ["variant", *(column.heading for column in columns), f"{medium}s"]
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def quality_notes(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What readers of the table must know."""
    measured, n_images = _measured(variants), max((v["n_images"] for v in variants.values()), default=0)
    return [m.note(n_images) for m in METRICS if m.note is not None and measured & {c.key for c in m.columns}]


def render_markdown(report: Mapping[str, Any]) -> str:
    """Renders the contents of `report.json` as Markdown."""
    variants = report["variants"]
    parts = [f"# {report['model']}", *_summary(report)]
    if variants:
        medium = report.get("medium", IMAGE.name)
        parts += [f"## {medium.capitalize()}s", variants_table(variants, medium)]
        if notes := quality_notes(variants):
            parts.append(" ".join(notes))
        if medium != LATENT.name:
            parts.append("![samples](samples.png)")
    if blocks := [b for b in report.get("blocks", []) if b["error_nearest"] is not None]:
        parts += [
            "## Units",
            "Errors are relative to the energy of the unit's full-precision output, on held-out samples.",
            "| unit | parameters | weights | activations | nearest | closed form | quantized | rounding | seconds |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
            + "\n".join(
                f"| {b['name']} | {b['parameters']:,} | {_formats(b['weight_formats'])} | "
                f"{_formats(b['activation_formats'])} | {b['error_nearest']:.2e} | "
                f"{_error(b.get('error_closed_form'))} | {b['error_quantized']:.2e} | "
                f"{b['kept'].replace('_', ' ')} | {b['seconds']:.1f} |"
                for b in blocks
            ),
        ]
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    fingerprint = f"Fingerprint `{report['fingerprint']}`; " if "fingerprint" in report else ""
    parts.append(f"{fingerprint}{packages}.")
    return "\n\n".join(parts) + "\n"


def recipe_phrase(recipe: Mapping[str, Any]) -> str:
    """A recipe (`Recipe.to_dict`) in words."""

    def named(formats: str | list[str] | None) -> str:
        return "full-precision" if formats is None else formats if isinstance(formats, str) else "/".join(formats)

    weights, activations, rounding = recipe["weights"], recipe["activations"], recipe["rounding"]
    size = f" of {weights['group_size']}" if weights["group_size"] else ""
    scales = "" if weights["formats"] is None else f" with a scale for each {weights['granularity']}{size}"
    rounded = "in closed form" if rounding["start"] == "closed_form" else "to nearest"
    if rounding["learned"]:
        rounded = f"learned for {rounding['iterations']} iterations a unit from rounding {rounded}"
    return (
        f"{named(weights['formats'])} weights{scales}, {named(activations['formats'])} activations, rounding {rounded}"
    )


def kept_phrase(report: Mapping[str, Any]) -> str:
    """The parameters of the denoiser that stay in full precision, in words; empty if that is not known."""
    return Coverage.from_dict(report["coverage"]).kept_phrase if report.get("coverage") else ""


def _summary(report: Mapping[str, Any]) -> list[str]:
    sentences = []
    if recipe := report.get("recipe"):
        sentences.append(f"Recipe: {recipe_phrase(recipe)}.")
    if report.get("weight_bits") is not None:
        sentences.append(
            f"{report['quantized_share']:.1%} of the denoiser's parameters are quantized, to "
            f"{report['weight_bits']:.2f} bits each (scales included); {report['sparsity']:.1%} of them are exactly "
            "zero."
        )
    if kept := kept_phrase(report):
        sentences.append(f"In full precision stay {kept}.")
    if size := report.get("disk_bytes"):
        sentences.append(f"The denoiser's files take {size / 2**20:.1f} MiB.")
    if calibration := report.get("calibration"):
        sentences.append(
            f"Calibrated in {calibration['seconds']:.0f} s on {report['device']} with {calibration['samples']} "
            f"samples, peak memory {calibration['peak_memory_bytes'] / 2**30:.2f} GiB."
        )
    return [" ".join(sentences)] if sentences else []
