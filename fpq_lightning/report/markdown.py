"""`report.md`."""

from __future__ import annotations

from collections import Counter
from typing import Any

_FEW_IMAGES = 2000


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _formats(chosen: dict[str, list[str]]) -> str:
    counts = Counter(name for names in chosen.values() for name in names)
    return ", ".join(f"{name} x{n}" for name, n in counts.most_common()) or "full precision"


def variants_table(variants: dict[str, dict[str, Any]]) -> str:
    """Image quality by variant."""
    lines = [
        "| variant | FD to full precision | FD to real | PSNR dB | SSIM | images |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, v in variants.items():
        cells = [_cell(v["fd"], 3), _cell(v["fd_real"], 2), _cell(v["psnr"], 2), _cell(v["ssim"], 4)]
        label = "full precision, other seeds (noise floor)" if name == "full_precision" else f"{name} rounding"
        lines.append(f"| {label} | {' | '.join(cells)} | {v['n_images']} |")
    return "\n".join(lines)


def render_markdown(report: dict[str, Any]) -> str:
    """Renders the contents of `report.json` for reading."""
    calibration, variants = report["calibration"], report["variants"]
    parts = [f"# {report['model']}, quantized"]
    if report["weight_bits"] is not None:
        parts.append(
            f"{report['quantized_share']:.1%} of the denoiser's weights are quantized, to "
            f"{report['weight_bits']:.2f} bits each (scales included); {report['sparsity']:.1%} of them are exactly "
            f"zero. Calibrated in {calibration['seconds']:.0f} s on {report['device']} with {calibration['samples']} "
            f"samples, peak memory {calibration['peak_memory_bytes'] / 2**30:.2f} GiB."
        )
    if variants:
        parts += ["## Images", variants_table(variants)]
        n = next(iter(variants.values()))["n_images"]
        if n < _FEW_IMAGES and any(v["fd"] is not None for v in variants.values()):
            parts.append(
                f"Fréchet distances of {n} images only rank the variants; they are not comparable with figures of "
                "other sample counts. All distances are FD (cifar10-features or the configured network), not FID."
            )
        parts.append("![samples](samples.png)")
    parts += [
        "## Units",
        "Errors are relative to the energy of the unit's full-precision output, on held-out samples.",
        "| unit | parameters | weights | activations | nearest | kept | rounding | seconds |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {b['name']} | {b['parameters']:,} | {_formats(b['weight_formats'])} | "
            f"{_formats(b['activation_formats'])} | {b['error_nearest']:.2e} | {b['error_learned']:.2e} | "
            f"{b['kept']} | {b['seconds']:.1f} |"
            for b in report["blocks"]
            if b["error_nearest"] is not None
        ),
    ]
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts.append(f"Fingerprint `{report['fingerprint']}`; {packages}.")
    return "\n\n".join(parts) + "\n"
