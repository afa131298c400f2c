"""Command line: ``python -m trellis2`` or ``trellis2``.

Everything heavy is imported where it is needed, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .errors import Cancelled, CapacityError, CheckpointError, InputError
from .options import GenerateOptions, OptionSpec, option_specs
from .progress import OnProgress
from .version import VERSION

if TYPE_CHECKING:
    from .pipeline import Files

DEBUG_VARIABLE = "TRELLIS2_DEBUG"
OK, FAILED, BAD_INPUT, BAD_CHECKPOINT, NO_CAPACITY, INTERRUPTED = 0, 1, 2, 3, 4, 130

_EPILOG = f"""\
exit codes:
  {OK:>3}  done
  {BAD_INPUT:>3}  the command line, the picture, an option or a file is not usable
  {BAD_CHECKPOINT:>3}  the model is missing, damaged or of another kind
  {NO_CAPACITY:>3}  not enough memory or disk space
  {INTERRUPTED:>3}  interrupted
  {FAILED:>3}  anything else ({DEBUG_VARIABLE}=1 shows where)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; usage errors and help end in SystemExit as argparse has it."""
    arguments = build_parser().parse_args(_dashed(sys.argv[1:] if argv is None else argv))
    try:
        arguments.command(arguments)
    except (KeyboardInterrupt, Cancelled) as error:
        return _fail(INTERRUPTED, "interrupted", error)
    except InputError as error:
        return _fail(BAD_INPUT, str(error), error)
    except CheckpointError as error:
        return _fail(BAD_CHECKPOINT, str(error), error)
    except CapacityError as error:
        return _fail(NO_CAPACITY, str(error), error)
    except Exception as error:
        return _fail(FAILED, f"{type(error).__name__}: {error}; {DEBUG_VARIABLE}=1 shows where.", error)
    return OK


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the options of ``generate`` are those of ``trellis2.options``."""
    parser = argparse.ArgumentParser(
        prog="trellis2",
        description="One picture in; a textured GLB, a turntable MP4 and a cut-out PNG out.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trellis2 {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_info(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        usage="trellis2 generate IMAGE [-o DIR] [options]",
        help="make a 3D asset from a picture",
        description="Make a 3D asset from a picture: DIR/model.glb, DIR/video.mp4 and, where asked for, "
        "DIR/no_background.png.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_generate)
    parser.add_argument(
        "image", metavar="IMAGE", type=Path, help="picture of one object: PNG, JPEG, WebP, BMP, TIFF or GIF"
    )
    parser.add_argument(
        "-o", "--out", metavar="DIR", type=Path, default=Path("out"), help="folder of the files (default: out)"
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        help="checkpoint (default: $TRELLIS2_MODEL, else the published one where there is a GPU, "
        "else the small one that comes with the code)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is an NVIDIA GPU")
    parser.add_argument(
        "--low-vram",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where the networks do not all fit on the GPU, copy each there while it computes (default: on); "
        "off: keep all of them there",
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="GIB",
        type=float,
        help="stay within this much GPU memory (default: $TRELLIS2_GPU_MEMORY, else all that is free)",
    )
    parser.add_argument(
        "--matting",
        metavar="FOLDER_OR_HUB_ID",
        help="network that removes backgrounds, or none to remove them by colour (default: $TRELLIS2_MATTING, "
        "else ZhengPeng7/BiRefNet, or none where the checkpoint has none)",
    )
    parser.add_argument("--json", action="store_true", help="write the result to standard output as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no warnings")
    documented = parser.add_argument_group("what to generate")
    extra = parser.add_argument_group("refinements")
    for spec in option_specs():
        _add_option(documented if spec.documented else extra, spec)


def _add_option(group: Any, spec: OptionSpec) -> None:
    flag = "--" + spec.name.replace("_", "-")
    description = spec.description.replace("%", "%%")
    common: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS}
    if spec.kind is bool:
        text = f"{description} (default: {'on' if spec.default else 'off'})"
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **common)
    elif spec.kind == "interval":
        text = f"{description} ({spec.allowed})"
        group.add_argument(flag, nargs=2, type=float, metavar=("LOW", "HIGH"), help=text, **common)
    elif spec.choices:
        text = f"{description} (default: {spec.default})"
        group.add_argument(flag, choices=spec.choices, help=text, **common)
    else:
        assert isinstance(spec.kind, type)
        notes = [] if spec.ge is None or spec.le is None else [f"{spec.ge:.15g} to {spec.le:.15g}"]
        notes += [] if spec.default is None else [f"default: {spec.default}"]
        text = f"{description} ({'; '.join(notes)})"
        metavar = "N" if spec.kind is int else "X"
        group.add_argument(flag, type=spec.kind, metavar=metavar, help=text, **common)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="say what is in a GLB or in a checkpoint",
        description="Say what is in a GLB file or in a checkpoint folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_info)
    parser.add_argument("path", metavar="FILE.glb|CHECKPOINT", type=Path, help="a GLB, or a folder with pipeline.json")
    parser.add_argument("--json", action="store_true", help="write JSON")


def _generate(arguments: argparse.Namespace) -> None:
    # Read when torch is imported: threads that spin while they wait starve those that work on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    names = {spec.name for spec in option_specs()}
    options = GenerateOptions(**{name: value for name, value in vars(arguments).items() if name in names})
    from .image import open_image

    # Before gigabytes of weights are loaded for a file that is no picture.
    image = open_image(arguments.image)
    started = perf_counter()
    with _reporting(quiet=arguments.quiet) as on_progress:
        from .pipeline import Pipeline

        _require_device(arguments.device)
        pipeline = Pipeline.from_pretrained(
            arguments.model,
            device=arguments.device,
            low_vram=arguments.low_vram,
            gpu_memory=arguments.gpu_memory,
            matting=arguments.matting,
        )
        files = pipeline.run(image, options, arguments.out, on_progress)
    result = {**asdict(files), "seconds": round(perf_counter() - started, 3)}
    _write(_as_json(result) if arguments.json else _summary(files, result["seconds"]))


def _info(arguments: argparse.Namespace) -> None:
    from .inspect import as_text, describe

    facts = describe(arguments.path)
    _write(_as_json(facts) if arguments.json else as_text(facts))


@contextmanager
def _reporting(*, quiet: bool) -> Iterator[OnProgress]:
    """Progress bar and warnings on standard error for the time of a run."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the libraries that load weights are imported
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger = logging.getLogger("trellis2")
    level, handler = logger.level, logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    layout = "{desc:<18}{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}"
    try:
        with (
            tqdm(total=1.0, desc="loading", bar_format=layout, disable=quiet, file=sys.stderr) as bar,
            logging_redirect_tqdm([logger]),
        ):

            def on_progress(stage: str, step: int, steps: int, fraction: float) -> None:
                bar.set_description_str(f"{stage} {step}/{steps}", refresh=False)
                bar.n = fraction
                bar.refresh()

            yield on_progress
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _require_device(device: str | None) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs an NVIDIA GPU, and none was found; use --device cpu.")


def _summary(files: Files, seconds: float) -> str:
    lines = []
    for title, path in (
        ("cut-out", files.no_background_image),
        ("video", files.video),
        ("model", files.model_file),
    ):
        if path is not None:
            lines.append(f"{title:<8}{path}")
    if files.statistics is not None:
        faces, vertices = files.statistics.faces, files.statistics.vertices
        lines.append(f"{'':<8}{faces:,} triangles, {vertices:,} vertices, {files.statistics.charts:,} charts")
    lines.append(f"{'seed':<8}{files.seed}")
    stages = ", ".join(f"{name} {value:.1f}" for name, value in files.timings.items())
    lines.append(f"{'time':<8}{seconds:.1f} s ({stages})")
    return "\n".join(lines)


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, default=str)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, where a full disk is still an error like any other


def _fail(code: int, text: str, error: BaseException) -> int:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"trellis2: {text}\n")
    return code


def _dashed(argv: Sequence[str]) -> list[str]:
    """Let options be written as in the documentation: ``--texture_size`` is ``--texture-size``."""
    dashed = []
    for word in argv:
        name, equals, value = word.partition("=")
        dashed.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return dashed


if __name__ == "__main__":
    sys.exit(main())
