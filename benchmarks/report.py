"""From measured results to text."""

from __future__ import annotations

from typing import Any


def text(run: dict[str, Any]) -> str:
    """One run for a terminal."""
    title = f"{run['implementation']} {run['preset']}, weights {run['residency']}"
    if run.get("cap_gib") is not None:
        title += f", at most {run['cap_gib']:g} GiB"
    lines = ["", title, "=" * len(title)]
    if "error" in run:
        return "\n".join([*lines, f"FAILED: {run['error']}"])
    counts = [f"{k} tokens {v:,}" for k, v in run.get("tokens", {}).items()]
    counts += [f"{key} {run[key]:,}" for key in ("voxels", "faces") if key in run]
    if "model" in run:
        counts.append(f"model of {run['model']['triangles']:,} triangles, {run['model']['bytes'] / 1e6:.1f} MB")
    lines.append("; ".join(counts))
    lines.append(
        f"{run['run']}: {run['run_seconds']['median']:.2f} s (cold {run['cold_seconds']:.2f} s); "
        f"flows at the rate of a matrix product: {run.get('floor_seconds', 0):.2f} s"
    )
    lines.append(
        f"peak {run['peak_device_gib']:.2f} GiB on the device ({run['device_memory_by']}), "
        f"{run['peak_torch_gib']:.2f} GiB in torch"
    )
    for part in ("run_parts", "stages", "bake_steps"):
        if run.get(part):
            lines.append(f"{part.replace('_', ' ')}, ms")
            lines += [f"  {name:<28}{1000 * value['median']:>12.1f}" for name, value in run[part].items()]
    return "\n".join(lines)
