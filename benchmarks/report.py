"""From measured results to text: a run for a terminal, and the README's section about performance.

    python -m benchmarks.report [benchmarks/results.json]

writes the section between the README's markers ``START`` and ``END``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
README = ROOT / "README.md"
START, END = "<!-- performance: written by python -m benchmarks.report -->\n", "<!-- /performance -->"

PRESETS = ("512", "1024", "1024_cascade", "1536_cascade")
STAGES = (
    "condition 512",
    "condition 1024",
    "structure flow",
    "structure decoder",
    "coarse shape flow",
    "upsample",
    "shape flow",
    "texture flow, cfg 7.5",
    "texture flow, cfg 1",
    "decode shape",
    "decode texture",
    "fill holes",
    "bake",
    "write GLB",
    "video",
)
# The texture flow counts once, with the documented guidance.
SAMPLED = ("structure flow", "coarse shape flow", "shape flow", "texture flow, cfg 7.5")

Run = dict[str, Any]


def text(run: Run) -> str:
    """One run for a terminal."""
    title = f"{run['implementation']} {run['preset']}, weights {run['residency']}"
    if run.get("matting"):
        title += ", background removed by a network"
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


def section(results: dict[str, Any]) -> str:
    """The README's section, in markdown."""
    machine = results["machine"]
    runs = [run for run in results["runs"] if "error" not in run and not run.get("small")]
    ours = {run["preset"]: run for run in runs if _is(run, "ours", "resident")}
    theirs = {run["preset"]: run for run in runs if _is(run, "original", "resident")}
    streamed = {run["preset"]: run for run in runs if _is(run, "ours", "streamed")}
    moved = {run["preset"]: run for run in runs if _is(run, "original", "moved")}
    capped = [run for run in results["runs"] if run.get("cap_gib") is not None and not run.get("small")]
    lines = [
        f"{machine['device']}, PyTorch {machine['torch']}, {machine['date']}; random weights of the published sizes, a "
        "procedural surface in place of what they decode, so that counts are those of a real asset. Medians of runs "
        f"after a first one. A bfloat16 matrix product of 8192^3 runs at {machine['matmul_teraflops']:.0f} TFLOP/s "
        "there; the floor is what all matrix products and attention of the flows would take at that rate.",
        "",
    ]
    if ours:
        lines += _overview(ours, theirs)
        lines += _stage_table(ours, theirs)
    if streamed or moved:
        lines += _memory_table(ours, theirs, streamed, moved)
    if capped:
        lines += _cap_table(capped)
    if "start" in results:
        lines += _start(results["start"])
    if "throughput" in results:
        found = results["throughput"]
        one, together = found["assets_a_minute"].values()
        lines += [
            f"{found['gpus']} GPUs of one host, each with a process of its own, made {together:.1f} assets a minute "
            f"(`{found['preset']}`, GLB and video), one alone {one:.1f}: {found['share_of_ideal']:.0%} of the ideal.",
            "",
        ]
    notes = sorted({note for run in theirs.values() for note in run.get("deviations", [])})
    if notes:
        lines += ["The original was measured with these differences: " + "; ".join(notes) + ".", ""]
    for note in (run["note"] for run in ours.values() if "note" in run):
        lines += [note, ""]
    return "\n".join(lines)


def _overview(ours: dict[str, Run], theirs: dict[str, Run]) -> list[str]:
    rows = []
    for preset in _known(ours):
        run, other = ours[preset], theirs.get(preset, {})
        sampled = sum(run["stages"][s]["median"] for s in SAMPLED if s in run.get("stages", {}))
        ratio = f"{sampled / run['floor_seconds']:.1f}" if sampled else "-"
        asset, other_asset = _until_asset(run), _until_asset(other)
        rows.append(
            [
                f"`{preset}`",
                f"{run['tokens']['fine']:,}",
                f"{run['voxels'] / 1e6:.2f} M" if "voxels" in run else "-",
                _seconds(asset),
                _seconds(other_asset),
                _seconds(run["run_seconds"]["median"] if run["run"] == "image to files" else None),
                _seconds(_until_files(other)),
                f"{run['floor_seconds']:.2f} s",
                ratio,
            ]
        )
    head = ["preset", "tokens", "voxels", "image to asset", "original", "image to GLB and video", "original"]
    head += ["floor of the flows", "flows / floor"]
    known = [column for column in range(len(head)) if any(row[column] != "-" for row in rows)]
    return _table([head[c] for c in known], [[row[c] for c in known] for row in rows])


def _stage_table(ours: dict[str, Run], theirs: dict[str, Run]) -> list[str]:
    """Milliseconds of each stage, ours / original."""
    presets = [preset for preset in _known(ours) if "stages" in ours[preset]]
    rows = []
    for stage in STAGES:
        row = []
        for preset in presets:
            mine, other = (run.get("stages", {}).get(stage) for run in (ours[preset], theirs.get(preset, {})))
            cells = [f"{1000 * one['median']:,.0f}" if one else "-" for one in ((mine, other) if other else (mine,))]
            row.append(" / ".join(cells) if mine or other else "")
        if any(row):
            rows.append([stage, *row])
    if not rows:
        return []
    return [
        "Milliseconds of each stage, ours / original where it was measured:",
        "",
        *_table(["stage", *(f"`{p}`" for p in presets)], rows),
    ]


def _memory_table(*kinds: dict[str, Run]) -> list[str]:
    head = ["preset", "weights resident", "original", "weights streamed", "original, `low_vram`"]
    rows = []
    for preset in _known({k: v for runs in kinds for k, v in runs.items()}):
        cells = []
        for runs in kinds:
            run = runs.get(preset)
            cells.append(f"{_seconds(_until_asset(run))}, {run['peak_device_gib']:.1f} GiB" if run else "-")
        rows.append([f"`{preset}`", *cells])
    return ["Image to asset, and the peak of GPU memory of the whole process:", "", *_table(head, rows)]


def _cap_table(capped: Iterable[Run]) -> list[str]:
    rows = []
    for run in sorted(capped, key=lambda run: (run["implementation"], PRESETS.index(run["preset"]))):
        done = "error" not in run
        rows.append(
            [
                run["implementation"],
                f"`{run['preset']}`",
                f"{run['cap_gib']:g} GiB",
                ("yes" if run.get("within_cap", True) else "no") if done else "no: " + run["error"].split(":")[0],
                f"{run['peak_device_gib']:.2f} GiB" if done else "-",
                _what(run) if done else "-",
            ]
        )
    head = ["", "preset", "free on the GPU", "done", "peak", "what"]
    return [
        "With all but a few GiB of the GPU taken by another process (peak: contexts and libraries included):",
        "",
        *_table(head, rows),
    ]


def _start(found: dict[str, Any]) -> list[str]:
    firsts = [
        f"{found[preset]['first_seconds']['median']:.1f} s (`{preset}`; the same again: "
        f"{found[preset]['warm_seconds']['median']:.1f} s)"
        for preset in _known(found)
    ]
    ready = _seconds(found["ready_seconds"]["median"])
    return [
        f"A process with 16 GB of weights, their files in the page cache, is ready {ready} after its start; its first "
        f"predictions, each of another size, take {' and '.join(firsts)}.",
        "",
    ]


def _what(run: Run) -> str:
    removed = ", background removed by a network" if run.get("matting") else ""
    return f"{run['run']}{removed}, {run['run_seconds']['median']:.1f} s"


def _is(run: Run, implementation: str, residency: str) -> bool:
    return (
        run["implementation"] == implementation
        and run["residency"] == residency
        and not run.get("cap_gib")
        and not run.get("matting")
    )


def _known(runs: dict[str, Run]) -> list[str]:
    return [preset for preset in PRESETS if preset in runs]


def _until_asset(run: Run | None) -> float | None:
    """Seconds from the picture to surface and material."""
    if not run:
        return None
    if run["run"] == "image to asset":
        return float(run["run_seconds"]["median"])
    parts = run["run_parts"].items()
    return float(sum(part["median"] for name, part in parts if name not in ("model", "video", "write")))


def _until_files(run: Run) -> float | None:
    """Of the original, whose files are measured alone."""
    extra = [run.get("stages", {}).get(stage) for stage in ("bake", "write GLB", "video")]
    asset = _until_asset(run)
    if asset is None or not all(extra):
        return None
    return asset + sum(stage["median"] for stage in extra if stage)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def write_section(readme: Path, results: Path) -> None:
    """Put the section of ``results`` between the markers of ``readme``.  Raises ValueError where it has none."""
    words = readme.read_text()
    if START not in words or END not in words:
        raise ValueError(f"{readme} has no lines {START.strip()} and {END}.")
    before, rest = words.split(START)
    readme.write_text(before + START + section(json.loads(results.read_text())) + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    write_section(README, Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
