"""The published checkpoint layout -> networks.

A checkpoint is a folder or a hub repository with ``pipeline.json``, which names one ``.json`` (class and arguments)
and one ``.safetensors`` per network.  Networks are built without memory on the meta device and take the file's
tensors as they are; every key must be there and none more, because a lenient load once left whole layers random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import CheckpointError
from .models.conditioning import (
    DINOV2_REPOSITORIES,
    DINOV2_SIZE,
    ImageEncoder,
    SmallEncoderConfig,
    SmallImageEncoder,
)
from .models.flow import Flow, FlowConfig
from .models.matting import BiRefNet, MattingConfig
from .models.structure_vae import StructureDecoder, StructureEncoder, StructureVaeConfig
from .models.vit import VisionTransformer, VitConfig, file_state
from .models.voxel_vae import VoxelDecoder, VoxelEncoder, VoxelVaeConfig
from .sampling import SamplerOptions

PIPELINE_NAME = "Trellis2ImageTo3DPipeline"
MODEL_NAMES = (
    "sparse_structure_flow_model",
    "sparse_structure_decoder",
    "shape_slat_flow_model_512",
    "shape_slat_flow_model_1024",
    "shape_slat_decoder",
    "tex_slat_flow_model_512",
    "tex_slat_flow_model_1024",
    "tex_slat_decoder",
)
DEFAULT_MATTING = "ZhengPeng7/BiRefNet"
"""The network that cuts objects out of pictures; MIT licence."""
MATTING_WEIGHTS = "model.safetensors"
ENCODER_CONFIG, ENCODER_WEIGHTS = "config.json", "model.safetensors"
LEFT_OUT = "left_out.json"
"""In a folder: a list of networks of pipeline.json whose files were left out on purpose (weights/fetch.py)."""

DERIVED_KEYS = {"rope_phases"}
TRAINING_KEYS = {"use_checkpoint", "initialization"}


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of a latent, each (1, C) float32: normalised = (latent - mean) / std."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Everything that pipeline.json names, loaded, but for the network that removes backgrounds.

    source: the folder or hub id it came from. removes_background: whether pipeline.json names such a network.
    """

    source: str
    models: Mapping[str, nn.Module]
    image_encoder: ImageEncoder | SmallImageEncoder
    structure_sampler: SamplerOptions
    shape_sampler: SamplerOptions
    texture_sampler: SamplerOptions
    shape_normalization: Normalization
    texture_normalization: Normalization
    removes_background: bool
    untrained: bool


@dataclass(frozen=True)
class ModelFiles:
    """The two files of one network."""

    config: Path
    weights: Path


class Source:
    """Where a checkpoint's files are: a folder or a hub repository."""

    def __init__(self, model: str | Path, holds: str = "pipeline.json") -> None:
        """model: folder or hub id. holds: the file by which a folder is known, for the message.

        Raises CheckpointError where it is neither.
        """
        self.name = str(model)
        self.folder = Path(model) if Path(model).is_dir() else None
        if self.folder is None and not _is_hub_id(self.name):
            raise CheckpointError(
                f"Model {self.name!r} is neither a folder nor a hub id like 'owner/name'; "
                f"pass the folder that holds {holds}."
            )

    def file(self, path: str) -> Path:
        """The local path of one file.  Raises CheckpointError where it is missing."""
        if self.folder is None:
            return _download(self.name, path)
        if not (self.folder / path).is_file():
            raise CheckpointError(f"{self.folder / path} is missing; the checkpoint is incomplete, fetch it again.")
        return self.folder / path

    def model(self, value: str) -> ModelFiles:
        """The files of a network: ``value`` is a path under the root, else ``owner/repository/path``."""
        if self._has(f"{value}.json"):
            return ModelFiles(self.file(f"{value}.json"), self.file(f"{value}.safetensors"))
        parts = value.split("/")
        if len(parts) < 3:
            return ModelFiles(self.file(f"{value}.json"), self.file(f"{value}.safetensors"))
        repository, path = "/".join(parts[:2]), "/".join(parts[2:])
        return ModelFiles(_download(repository, f"{path}.json"), _download(repository, f"{path}.safetensors"))

    def _has(self, path: str) -> bool:
        if self.folder is not None:
            return (self.folder / path).is_file()
        from huggingface_hub.errors import EntryNotFoundError

        try:
            _download(self.name, path)
        except CheckpointError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return False
            raise
        return True


def load_checkpoint(model: str | Path, *, dtype: torch.dtype | None = None) -> Checkpoint:
    """Load all networks of a checkpoint into host memory.

    model: a folder or a hub id. dtype: that of the torsos, None for what the files say.
    Raises CheckpointError naming the file and what is wrong with it.
    """
    source = Source(model)
    path = source.file("pipeline.json")
    config = read_json(path)
    try:
        if config["name"] != PIPELINE_NAME:
            raise CheckpointError(f"{path} is for {config['name']!r}, not {PIPELINE_NAME}.")
        args = config["args"]
        # The cheap parts first, so that a wrong file is named before gigabytes are read.
        samplers = [_sampler(args[f"{s}_sampler"]) for s in ("sparse_structure", "shape_slat", "tex_slat")]
        normalizations = [_normalization(args[f"{s}_slat_normalization"]) for s in ("shape", "tex")]
        encoder = args["image_cond_model"]
        left_out = _left_out(source)
        names = [name for name in MODEL_NAMES if name in args["models"] and name not in left_out]
        files = {name: source.model(args["models"][name]) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not usable: {type(error).__name__}: {error}.") from error
    return Checkpoint(
        source=source.name,
        models={name: load_model(pair, dtype) for name, pair in files.items()},
        image_encoder=_image_encoder(source, encoder),
        structure_sampler=samplers[0],
        shape_sampler=samplers[1],
        texture_sampler=samplers[2],
        shape_normalization=normalizations[0],
        texture_normalization=normalizations[1],
        removes_background="rembg_model" in args,
        untrained=bool(config.get("untrained", False)),
    )


def load_model(files: ModelFiles, dtype: torch.dtype | None = None) -> nn.Module:
    """Build one network and fill it from its file.  Raises CheckpointError."""
    config = read_json(files.config)
    try:
        model = build_model(config["name"], config["args"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{files.config} is not usable: {error}.") from error
    state = _read_weights(files.weights)
    if dtype is not None:
        model.set_dtype(dtype)  # type: ignore[operator]
    try:
        fill_model(model, state)
    except ValueError as error:
        raise CheckpointError(f"{files.weights} does not fit {files.config.name}: {error}.") from error
    return model


def load_image_encoder(kind: str, model: str | Path) -> ImageEncoder | SmallImageEncoder:
    """Load the network that makes image tokens, into host memory, in float32.

    kind: as pipeline.json names it: "DinoV3FeatureExtractor", "DinoV2FeatureExtractor" or "SmallImageEncoder".
    model: a folder or a hub id, with ``config.json`` and ``model.safetensors``.
    Raises CheckpointError naming the file and what is wrong with it.
    """
    source = Source(model, ENCODER_CONFIG)
    path = source.file(ENCODER_CONFIG)
    config = read_json(path)
    try:
        with torch.device("meta"):
            if kind == "SmallImageEncoder":
                encoder: Any = SmallImageEncoder(SmallEncoderConfig.of_json(config))
            elif kind == "DinoV3FeatureExtractor":
                encoder = ImageEncoder(VisionTransformer(VitConfig.of_json(config)))
            elif kind == "DinoV2FeatureExtractor":
                encoder = ImageEncoder(VisionTransformer(VitConfig.of_json(config)), DINOV2_SIZE)
            else:
                raise CheckpointError(f"{kind!r} is not a known kind.")
    except (KeyError, TypeError, ValueError) as error:
        problem = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is not of a {kind}: {problem}.") from error
    weights = source.file(ENCODER_WEIGHTS)
    state = _read_weights(weights)
    try:
        if kind == "SmallImageEncoder":
            fill_model(encoder, state)
        else:
            fill_model(encoder.backbone, file_state(state))
    except ValueError as error:
        raise CheckpointError(f"{weights} does not fit {path.name}: {error}.") from error
    loaded: ImageEncoder | SmallImageEncoder = encoder.eval()
    return loaded


def load_matting(
    model: str | Path = DEFAULT_MATTING, *, checkpoint: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> BiRefNet:
    """Load a BiRefNet, as published (``model.safetensors``), into host memory; none of a hub's code is run.

    model: a folder or a hub id: ZhengPeng7/BiRefNet or one of its kin, or briaai/RMBG-2.0. The latter's weights are
    made for another order of tiles, which only its name tells: a copy of it has to be in a folder "RMBG-2.0" or in
    the hub's cache. checkpoint: one whose folder is looked into, for a folder of the hub id's name, before the hub is
    asked. dtype: to compute in; float16 halves the memory and is for GPUs.
    Raises CheckpointError naming the file and what is wrong with it.
    """
    if checkpoint is not None and not Path(model).is_dir() and (Path(checkpoint) / model).is_dir():
        model = Path(checkpoint) / model
    source = Source(model, MATTING_WEIGHTS)
    path = source.file(MATTING_WEIGHTS)
    state = _read_weights(path)
    try:
        config = MattingConfig.of_file(state, tiles_by_column=_repository(path).lower().endswith("rmbg-2.0"))
        with torch.device("meta"):
            network = BiRefNet(config).eval()
        network.set_dtype(dtype)
        unused = network.unused_keys()
        fill_model(network, {key: value for key, value in state.items() if key not in unused})
    except (KeyError, IndexError, ValueError) as error:
        problem = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is not a BiRefNet: {problem}; use that of {DEFAULT_MATTING}.") from error
    return network


def build_model(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Build a network without memory, on the meta device.

    name, args: as in a published model JSON.  Raises ValueError on an unknown class or argument.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown class {name!r}; known are {', '.join(_BUILDERS)}")
    with torch.device("meta"):
        return _BUILDERS[name](dict(args)).eval().requires_grad_(False)


def fill_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a meta network its tensors, in the dtypes that it was built with.

    Raises ValueError naming missing, unknown and misshapen tensors.
    """
    wanted = model.state_dict()
    problems = [f"missing {key}" for key in wanted.keys() - state.keys()]
    problems += [f"unknown {key}" for key in state.keys() - wanted.keys() - DERIVED_KEYS]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(", ".join(sorted(problems)[:5]) + more)
    cast = {key: state[key].to(value.dtype) for key, value in wanted.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    model.requires_grad_(False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises CheckpointError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _left_out(source: Source) -> list[str]:
    if source.folder is None or not (source.folder / LEFT_OUT).is_file():
        return []
    path = source.folder / LEFT_OUT
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(names, list) or not set(names) <= set(MODEL_NAMES):
        raise CheckpointError(f"{path} must be a list of names of networks; fetch it again.")
    return names


def _flow(args: dict[str, Any]) -> nn.Module:
    positions = args.pop("pe_mode", None)
    if positions not in ("rope", "rope+ape"):
        raise ValueError(f"pe_mode={positions!r} is not supported, only 'rope' and 'rope+ape'")
    args["absolute_positions"] = positions == "rope+ape"
    _expect(args, {"share_mod": True, "qk_rms_norm": True, "qk_rms_norm_cross": True})
    head_channels = args.pop("num_head_channels", 64)
    if args.get("num_heads") is None:
        args["num_heads"] = args["model_channels"] // head_channels
    if "rope_freq" in args:
        args["rope_freq"] = tuple(args["rope_freq"])
    return Flow(_config(FlowConfig, args))


def _structure_vae(vae: type[StructureEncoder] | type[StructureDecoder], io: str) -> Callable[..., nn.Module]:
    def build(args: dict[str, Any]) -> nn.Module:
        _expect(args, {"norm_type": "layer"}, optional=True)
        args["io_channels"] = args.pop(io)
        args["channels"] = tuple(args["channels"])
        return vae(_config(StructureVaeConfig, args))

    return build


def _voxel_vae(
    vae: type[VoxelEncoder] | type[VoxelDecoder], io: str | int, step_key: str, step_class: str
) -> Callable[..., nn.Module]:
    def build(args: dict[str, Any]) -> nn.Module:
        levels = len(args["num_blocks"])
        _expect(args, {"block_type": ["SparseConvNeXtBlock3d"] * levels, step_key: [step_class] * (levels - 1)})
        if any(block.keys() - TRAINING_KEYS for block in args.pop("block_args")):
            raise ValueError("block_args other than use_checkpoint are not supported")
        args["io_channels"] = args.pop(io) if isinstance(io, str) else io
        args.pop("resolution", None)  # of the training data; a decoder follows its latent
        for key in ("model_channels", "num_blocks"):
            args[key] = tuple(args[key])
        return vae(_config(VoxelVaeConfig, args))

    return build


_UP = ("up_block_type", "SparseResBlockC2S3d")
_DOWN = ("down_block_type", "SparseResBlockS2C3d")
_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "SparseStructureFlowModel": _flow,
    "SLatFlowModel": _flow,
    "ElasticSLatFlowModel": _flow,
    "SparseStructureEncoder": _structure_vae(StructureEncoder, "in_channels"),
    "SparseStructureDecoder": _structure_vae(StructureDecoder, "out_channels"),
    "FlexiDualGridVaeEncoder": _voxel_vae(VoxelEncoder, 6, *_DOWN),
    "FlexiDualGridVaeDecoder": _voxel_vae(VoxelDecoder, 7, *_UP),
    "SparseUnetVaeEncoder": _voxel_vae(VoxelEncoder, "in_channels", *_DOWN),
    "SparseUnetVaeDecoder": _voxel_vae(VoxelDecoder, "out_channels", *_UP),
}


def _expect(args: dict[str, Any], fixed: Mapping[str, Any], optional: bool = False) -> None:
    """Take arguments that only ever have one value out of ``args``."""
    for key, value in fixed.items():
        found = args.pop(key, value if optional else None)
        if found != value:
            raise ValueError(f"{key}={found!r} is not supported, only {value!r}")


def _config(kind: Callable[..., Any], args: Mapping[str, Any]) -> Any:
    return kind(**{key: value for key, value in args.items() if key not in TRAINING_KEYS})


def _sampler(entry: Mapping[str, Any]) -> SamplerOptions:
    params = dict(entry["params"])
    if entry["name"] == "FlowEulerSampler":
        params["guidance_strength"] = 1.0
    elif entry["name"] not in ("FlowEulerCfgSampler", "FlowEulerGuidanceIntervalSampler"):
        raise ValueError(f"unknown sampler {entry['name']!r}")
    low, high = params.get("guidance_interval", (0.0, 1.0))
    return SamplerOptions(
        steps=params.get("steps", 50),
        guidance_strength=params.get("guidance_strength", 3.0),
        guidance_rescale=params.get("guidance_rescale", 0.0),
        guidance_interval=(low, high),
        rescale_t=params.get("rescale_t", 1.0),
        sigma_min=entry["args"]["sigma_min"],
    )


def _normalization(entry: Mapping[str, Any]) -> Normalization:
    mean, std = (torch.tensor(entry[key], dtype=torch.float32)[None] for key in ("mean", "std"))
    if mean.shape != std.shape or not (std > 0).all():
        raise ValueError("normalization needs as many means as standard deviations, all above zero")
    return Normalization(mean, std)


def _image_encoder(source: Source, entry: Mapping[str, Any]) -> ImageEncoder | SmallImageEncoder:
    name = entry["args"]["model_name"]
    local = source.folder / name if source.folder is not None else None
    where = str(local) if local is not None and local.is_dir() else DINOV2_REPOSITORIES.get(name, name)
    try:
        return load_image_encoder(entry["name"], where)
    except CheckpointError as error:
        raise CheckpointError(f"The image encoder {name!r} cannot be loaded: {error}") from error


def _repository(path: Path) -> str:
    """The folder of a file; in the hub's cache, where it is owner--name/snapshots/revision, the owner and name."""
    folder = path.parent.resolve()
    return folder.parents[1].name if folder.parent.name == "snapshots" else folder.name


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _download(repository: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, path))
    except GatedRepoError as error:
        raise CheckpointError(f"{repository} is gated; accept its terms on the hub and log in with a token.") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repository} has no {path}, or it cannot be reached from here.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} of {repository} cannot be downloaded ({str(error).splitlines()[0]}); "
            "check the name and the network, or pass a local folder."
        ) from error
