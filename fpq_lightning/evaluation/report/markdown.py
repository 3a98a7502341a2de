"""`report.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_FEW_IMAGES = 2000


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _formats(chosen: dict[str, list[str]]) -> str:
    counts = Counter(name for names in chosen.values() for name in names)
    return ", ".join(f"{name} x{n}" for name, n in counts.most_common()) or "full precision"


_COLUMNS = {  # of the table of variants: title and digits
    "fd": ("FD", 3),
    "fid": ("FID", 2),
    "sfid": ("sFID", 2),
    "kid": ("KID x1000", 2),
    "kid_inception": ("KID (Inception) x1000", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "is": ("IS", 2),
    "is_inception": ("IS (Inception)", 2),
    "class_accuracy": ("class accuracy", 4),
    "class_accuracy_low": ("2.5 %", 4),
    "class_accuracy_high": ("97.5 %", 4),
    "clip_score": ("CLIP score", 2),
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "fd_real": ("FD to real", 2),
    "fid_real": ("FID to real", 2),
}


def variant_label(name: str) -> str:
    """What a variant is called in reports."""
    return {"nearest": "nearest rounding", "learned": "learned rounding"}.get(name, name.replace("_", " "))


def variant_rows(variants: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of image quality: to full precision where nothing else is said."""
    measured = {name for v in variants.values() for name, value in v.items() if value is not None}
    columns = {name: column for name, column in _COLUMNS.items() if name in measured}
    rows = []
    for name, v in variants.items():
        scaled = {
            key: None if v.get(key) is None else v[key] * (1e3 if key.startswith("kid") else 1) for key in columns
        }
        cells = [_cell(scaled[key], digits) for key, (_, digits) in columns.items()]
        label = "full precision, other seeds (noise floor)" if name == "full_precision" else variant_label(name)
        broken = f" ({v['not_finite']} not finite)" if v.get("not_finite") else ""
        rows.append([label, *cells, f"{v['n_images']}{broken}"])
    return ["variant", *(title for title, _ in columns.values()), "images"], rows


def variants_table(variants: dict[str, dict[str, Any]]) -> str:
    """Image quality by variant."""
    header, rows = variant_rows(variants)
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def quality_notes(variants: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of the table must know."""
    notes = []
    if any(v.get("fd") is not None for v in variants.values()):
        notes.append("FD, KID, IS, precision and recall are on the configured feature network, not on Inception.")
        n = next(iter(variants.values()))["n_images"]
        if n < _FEW_IMAGES:
            notes.append(
                f"Fréchet distances of {n} images only rank the variants; they are not comparable with figures of "
                "other sample counts."
            )
    if any(v.get("fid") is not None for v in variants.values()):
        notes.append("FID follows the published convention: images resized without antialiasing.")
    return notes


def render_markdown(report: Mapping[str, Any]) -> str:
    """Renders the contents of `report.json` for reading."""
    variants = report["variants"]
    parts = [f"# {report['model']}", *_summary(report)]
    if variants:
        parts += ["## Images", variants_table(variants)]
        if notes := quality_notes(variants):
            parts.append(" ".join(notes))
        parts.append("![samples](samples.png)")
    if blocks := [b for b in report.get("blocks", []) if b["error_nearest"] is not None]:
        parts += [
            "## Units",
            "Errors are relative to the energy of the unit's full-precision output, on held-out samples.",
            "| unit | parameters | weights | activations | nearest | kept | rounding | seconds |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
            + "\n".join(
                f"| {b['name']} | {b['parameters']:,} | {_formats(b['weight_formats'])} | "
                f"{_formats(b['activation_formats'])} | {b['error_nearest']:.2e} | {b['error_quantized']:.2e} | "
                f"{b['kept']} | {b['seconds']:.1f} |"
                for b in blocks
            ),
        ]
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    fingerprint = f"Fingerprint `{report['fingerprint']}`; " if "fingerprint" in report else ""
    parts.append(f"{fingerprint}{packages}.")
    return "\n\n".join(parts) + "\n"


def recipe_phrase(recipe: Mapping[str, Any]) -> str:
    """What a model was quantized to, and how: from `Recipe.to_dict`."""

    def named(formats: str | list[str] | None) -> str:
        return "full-precision" if formats is None else formats if isinstance(formats, str) else "/".join(formats)

    weights, rounding = recipe["weights"], recipe["rounding"]
    size = f" of {weights['group_size']}" if weights["group_size"] else ""
    scales = "" if weights["formats"] is None else f" with a scale for each {weights['granularity']}{size}"
    learned = f"learned for {rounding['iterations']} iterations a unit" if rounding["learned"] else "to nearest"
    return (
        f"{named(weights['formats'])} weights{scales}, "
        f"{named(recipe['activations']['formats'])} activations, rounding {learned}"
    )


def _summary(report: Mapping[str, Any]) -> list[str]:
    sentences = []
    if recipe := report.get("recipe"):
        sentences.append(f"Recipe: {recipe_phrase(recipe)}.")
    if report.get("weight_bits") is not None:
        sentences.append(
            f"{report['quantized_share']:.1%} of the denoiser's weights are quantized, to "
            f"{report['weight_bits']:.2f} bits each (scales included); {report['sparsity']:.1%} of them are exactly "
            "zero."
        )
    if size := report.get("disk_bytes"):
        sentences.append(f"The denoiser's files take {size / 2**20:.1f} MiB.")
    if calibration := report.get("calibration"):
        sentences.append(
            f"Calibrated in {calibration['seconds']:.0f} s on {report['device']} with {calibration['samples']} "
            f"samples, peak memory {calibration['peak_memory_bytes'] / 2**30:.2f} GiB."
        )
    return [" ".join(sentences)] if sentences else []
