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
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "fd_real": ("FD to real", 2),
    "fid_real": ("FID to real", 2),
}


def variants_table(variants: dict[str, dict[str, Any]]) -> str:
    """Image quality by variant: to full precision where nothing else is said."""
    columns = {
        name: title for name, title in _COLUMNS.items() if any(v.get(name) is not None for v in variants.values())
    }
    lines = [
        f"| variant | {' | '.join(title for title, _ in columns.values())} | images |",
        f"|{' --- |' * (len(columns) + 2)}",
    ]
    for name, v in variants.items():
        scale = {key: 1e3 if key.startswith("kid") else 1.0 for key in columns}
        cells = [
            _cell(None if v.get(key) is None else v[key] * scale[key], digits) for key, (_, digits) in columns.items()
        ]
        label = "full precision, other seeds (noise floor)" if name == "full_precision" else f"{name} rounding"
        broken = f" ({v['not_finite']} not finite)" if v.get("not_finite") else ""
        lines.append(f"| {label} | {' | '.join(cells)} | {v['n_images']}{broken} |")
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
        if n < _FEW_IMAGES and any(v.get("fd") is not None for v in variants.values()):
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
