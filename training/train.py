"""Train: torchrun --nproc_per_node GPUS -m training.train CONFIG --data FOLDER --out FOLDER

One process a GPU (without torchrun, one process on a GPU or on the CPU). The out folder gets NAME.csv (the log),
NAME.jpg (a preview) and NAME.safetensors, the moving averages of all trained networks in half precision, which is small
and enough to go on from.  With --state, the whole state is kept too, from which a run goes on as if it had not stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .data import SHARDS, moved, with_tensors
from .optim import MasterWeights, MovingAverage, clipper_of, optimizer_of
from .previews import preview
from .trainers import Objective, build_objective

logger = logging.getLogger("training")

LOADERS = 4  # threads that read files
PATIENCE = 1800  # seconds to wait for the first objects


class Pool:
    """The objects of a folder, in memory; those that are written later join when they are there.

    Files go to ``SHARDS`` shards by their number.  A batch takes its k-th object from shard k mod SHARDS, so that a
    process which trains on every n-th object of a batch needs only the shards that these come from.
    """

    def __init__(
        self, folder: Path, load: Callable[[Path], Any], shards: Sequence[int] | None, capacity: int, wait: int
    ) -> None:
        """load: reads a file. shards: those that this process needs, None for one shard of everything.
        capacity: objects to keep. wait: objects to have before this returns."""
        self.folder, self.load, self.capacity = folder, load, capacity
        self.sharded = shards is not None
        self.items: dict[int, list[Any]] = {shard: [] for shard in shards or [0]}
        self._seen: set[Path] = set()
        started = time.monotonic()
        while not self._ready(wait):
            if not self._load(wait):
                if time.monotonic() - started > PATIENCE:
                    raise SystemExit(f"{folder} has {len(self)} objects after half an hour; {wait} are needed.")
                time.sleep(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return sum(len(items) for items in self.items.values())

    def pick(self, slot: int, generator: torch.Generator) -> Any:
        """An object for one place in a batch."""
        items = self.items[slot % SHARDS if self.sharded else 0]
        return items[int(torch.randint(len(items), (1,), generator=generator))]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _ready(self, wait: int) -> bool:
        return len(self) >= min(wait, self.capacity) and all(self.items.values())

    def _watch(self) -> None:
        while not self._stop.wait(3):
            while len(self) < self.capacity and not self._stop.is_set() and self._load(self.capacity):
                pass

    def _load(self, wanted: int) -> bool:
        """Read some of the files that are new, in their order.  Returns whether there were any."""
        new = []
        for path in sorted(self.folder.glob("*.npz")):
            shard = int(path.stem) % SHARDS if self.sharded else 0
            if path not in self._seen and shard in self.items:
                new.append((shard, path))
        new = new[: max(min(wanted, self.capacity) - len(self), 0) or 1][: 8 * LOADERS]
        self._seen.update(path for _, path in new)
        with ThreadPoolExecutor(LOADERS) as readers:
            for (shard, _), item in zip(new, readers.map(lambda pair: self.load(pair[1]), new), strict=True):
                self.items[shard].append(item)
        return bool(new)


class Run:
    """A training run in one of ``world`` processes."""

    def __init__(
        self,
        config: Mapping[str, Any],
        data: Path,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
        frozen: Sequence[str] = (),
    ) -> None:
        """frozen: names of networks that stay as they are.  Raises ValueError where the config has no such network."""
        self.config, self.data, self.device, self.rank, self.world = config, data, device, rank, world
        args = config["trainer"]["args"]
        self.args = args
        self.seed = int(args.get("seed", 0))
        self.objective = build_objective(config, data, self.seed)
        for name in frozen:
            if name not in self.objective.models:
                raise ValueError(f"{name} is not one of {', '.join(self.objective.models)}.")
            self.objective.models[name].requires_grad_(False)
        if device.type == "cuda":
            for network in self.objective.models.values():
                if hasattr(network, "set_dtype"):
                    network.set_dtype(torch.bfloat16)
        self.objective.to(device)
        named = dict(self.objective.models.named_parameters())
        # Masters come from what was drawn in float32 where that differs: the draw is repeated, not rounded.
        self.masters = MasterWeights(named)
        if device.type == "cuda":
            exact = dict(build_objective(config, data, self.seed).models.named_parameters())
            self.masters.load_state_dict({name: value.detach() for name, value in exact.items()})
        self.average = MovingAverage(self.masters.state_dict(), float(args.get("ema_rate", [0.9999])[0]))
        self.optimizer = optimizer_of(args["optimizer"], self.masters.masters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.clipper = clipper_of(args.get("grad_clip", 1.0))
        self.step = 0
        self.warm_from = 0  # the step at which the optimiser was new
        self.cooled = 1.0  # factor of the learning rate at the end of a run
        self.local: Any = self.objective
        if world > 1:
            self.local = DistributedDataParallel(self.objective)

    @property
    def batch(self) -> int:
        """Objects in a step, over all processes."""
        return int(self.args["batch_size_per_gpu"]) * self.world

    def shards(self) -> list[int] | None:
        """Those that this process needs, None where batches are too small for them."""
        if self.batch % SHARDS or SHARDS % self.world:
            return None
        return [shard for shard in range(SHARDS) if shard % self.world == self.rank]

    def prepare(self, pool: Pool, step: int) -> list[tuple[Any, float]]:
        """What this process trains on in a step: batches on the CPU, each with its share of the objects."""
        slots = range(self.rank, self.batch, self.world)
        generators = [torch.Generator().manual_seed((self.seed << 48) + (step << 16) + slot) for slot in slots]
        items = [pool.pick(slot, g) for slot, g in zip(slots, generators, strict=True)]
        split = int(self.args.get("batch_split", 1))
        parts = []
        for part in range(split):
            chosen = slice(part * len(items) // split, (part + 1) * len(items) // split)
            batch = self.objective.prepare(items[chosen], generators[chosen])
            if self.device.type == "cuda":
                batch = with_tensors(batch, Tensor.pin_memory)
            parts.append((batch, len(items[chosen]) / len(items)))
        return parts

    def train_step(self, parts: Sequence[tuple[Any, float]]) -> dict[str, Tensor]:
        """One update on what ``prepare`` made.  Returns the terms of this process's objects and the gradient's norm."""
        sums: dict[str, Tensor] = {}
        for number, (batch, share) in enumerate(parts):
            whole = self.world == 1 or number == len(parts) - 1  # the last part also sums up over the processes
            with nullcontext() if whole else self.local.no_sync():
                terms = self.local(moved(batch, self.device))
                (terms["loss"] * share).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        self.masters.take_gradients()
        norm = self.clipper(self.masters.masters.values())
        warm = min(1.0, (self.step - self.warm_from + 1) / max(int(self.args.get("warmup_steps", 0)), 1))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * warm * self.cooled
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            logger.warning("step %d: the gradient is not finite; left out", self.step)
        self.masters.fill()
        self.step += 1
        self.average.update(self.masters.state_dict(), self.step)
        return {**sums, "grad_norm": torch.tensor(norm)}

    # -----------------------------------------------------------------------------------------------------------
    # files

    def save_average(self, path: Path) -> None:
        """All networks in float16 with the config and the step; the old file stays until the new one is whole."""
        state = {name: value.to(torch.float16).cpu().contiguous() for name, value in self.average.values.items()}
        metadata = {"config": json.dumps(self.config), "step": str(self.step)}
        if hasattr(self.objective, "shape_mean"):
            metadata["normalization"] = json.dumps(self.normalization())
        part = path.with_suffix(".part")
        save_file(state, part, metadata=metadata)
        part.rename(path)

    def normalization(self) -> dict[str, dict[str, list[float]]]:
        return {
            name: {key: getattr(self.objective, f"{name}_{key}").tolist() for key in ("mean", "std")}
            for name in ("structure", "shape", "texture")
            if hasattr(self.objective, f"{name}_mean")
        }

    def load_average(self, path: Path) -> None:
        """Go on from ``save_average``: its weights become the masters' and the average's, its step and its
        normalisation the run's; the optimiser starts anew and so does its warm-up."""
        state, metadata = read_average(path)
        self._start_from(state)
        self.step = self.warm_from = int(metadata["step"])
        for name, values in json.loads(metadata.get("normalization", "{}")).items():
            for key, value in values.items():
                getattr(self.objective, f"{name}_{key}").copy_(torch.tensor(value))

    def load_networks(self, files: Mapping[str, str]) -> None:
        """Start from the files of single networks, as published, by their names in the config (finetune_ckpt).

        Raises ValueError where a tensor is missing or of another shape.
        """
        state = dict(self.masters.state_dict())
        for name, path in files.items():
            network = self.objective.stages[0] if name == "denoiser" else name
            tensors = load_file(path)
            for key in self.objective.models[network].state_dict():
                if key not in tensors or tensors[key].shape != state[f"{network}.{key}"].shape:
                    raise ValueError(f"{path} does not fit {name}: {key} is missing or of another shape.")
                state[f"{network}.{key}"] = tensors[key].float()
        self._start_from(state)

    def _start_from(self, state: Mapping[str, Tensor]) -> None:
        self.masters.load_state_dict({name: value.to(self.device) for name, value in state.items()})
        self.average = MovingAverage(self.masters.state_dict(), self.average.rate)

    def save_state(self, path: Path) -> None:
        """Everything: from ``load_state`` on, a run makes the same steps as if it had not stopped."""
        state = {
            "step": self.step,
            "warm_from": self.warm_from,
            "masters": self.masters.state_dict(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "norms": list(self.clipper.norms),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.rename(path)

    def load_state(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step, self.warm_from = state["step"], state["warm_from"]
        self.masters.load_state_dict(state["masters"])
        self.average.values = {name: value.clone() for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.clipper.norms.extend(state["norms"])

    @contextmanager
    def averaged(self) -> Iterator[Objective]:
        """The objective with the averages for weights, as long as the block lasts."""
        with torch.no_grad():
            for name, parameter in self.masters.parameters.items():
                parameter.copy_(self.average.values[name])
            try:
                yield self.objective.eval()
            finally:
                self.objective.train()
                self.masters.fill()


class Batches:
    """What a run trains on, step by step; the next one is made in a thread while the run is at one."""

    def __init__(self, run: Run, pool: Pool) -> None:
        self.run, self.pool = run, pool
        # Which GPU is the current one, each thread decides for itself; page-locked memory is the current one's.
        prepare = partial(torch.cuda.set_device, run.device) if run.device.type == "cuda" else None
        self._maker = ThreadPoolExecutor(1, initializer=prepare)
        self._next = self._maker.submit(run.prepare, pool, run.step)

    def __next__(self) -> list[tuple[Any, float]]:
        """Of the run's step."""
        parts = self._next.result()
        self._next = self._maker.submit(self.run.prepare, self.pool, self.run.step + 1)
        return parts

    def close(self) -> None:
        self._maker.shutdown()
        self.pool.close()


def read_average(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 by name ("encoder.input_layer.weight"), and the metadata of ``Run.save_average``."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata()  # noqa: SIM118


class Log:
    """A table: one row every few steps, means since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.since = time.monotonic()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def write(self, step: int, batch: int, objects: int) -> None:
        now = time.monotonic()
        rate = self.count * batch / max(now - self.since, 1e-9)
        row = {"step": step, **{name: float(value) / self.count for name, value in self.sums.items()}}
        row |= {"objects_per_second": rate, "pool": objects}
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, row)
            if new:
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        text = " ".join(f"{k}={v:.4g}" for k, v in row.items() if k != "step")
        logger.info("step %d %s", step, text)
        self.sums, self.count, self.since = {}, 0, now


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a training config: models, dataset, trainer")
    parser.add_argument("--data", type=Path, required=True, help="folder of .npz files, from make_data or encode")
    parser.add_argument("--out", type=Path, required=True, help="folder for averages, log and previews")
    parser.add_argument("--state", type=Path, help="folder for the whole state; a run there goes on where it stopped")
    parser.add_argument("--resume", type=Path, help="averages (.safetensors) to go on from")
    parser.add_argument("--vae", type=Path, help="folder of the VAEs' averages, with which flows preview whole objects")
    parser.add_argument("--steps", type=int, help="stop after this many steps; max_steps of the config otherwise")
    parser.add_argument("--freeze", nargs="+", default=[], metavar="NAME", help="networks of the config to leave alone")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the config's learning rate")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes")
    parser.add_argument("--cooldown", type=float, default=0.0, help="of them, minutes in which the rate falls to zero")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="how often averages are written")
    parser.add_argument("--capacity", type=int, default=4000, help="objects that one process keeps in memory")
    parser.add_argument("--wait", type=int, default=64, help="objects to wait for before the first step")
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        # cuDNN plans attention anew for every size, which takes the host longer than all of a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        torch.use_deterministic_algorithms(True)  # sums of gradients by index are in no order otherwise
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    started = time.monotonic()
    config = json.loads(args.config.read_text(encoding="utf-8"))
    name = args.config.stem
    run = Run(config, args.data, device, rank=rank, world=world, frozen=args.freeze)
    run.rates = [rate * args.rate for rate in run.rates]
    first = rank == 0
    args.out.mkdir(parents=True, exist_ok=True)
    state = None if args.state is None else args.state / f"{name}.pt"
    if state is not None:
        state.parent.mkdir(parents=True, exist_ok=True)
    if state is not None and state.is_file():
        run.load_state(state)
    elif args.resume is not None:
        run.load_average(args.resume)
    elif "finetune_ckpt" in run.args:
        run.load_networks(run.args["finetune_ckpt"])
    batches = Batches(run, Pool(args.data, run.objective.load, run.shards(), args.capacity, args.wait))
    pool = batches.pool
    last = args.steps if args.steps is not None else int(config["trainer"]["args"]["max_steps"])
    log, saved = Log(args.out / f"{name}.csv"), time.monotonic()
    every = config["trainer"]["args"]
    over = False
    while run.step < last:
        log.add(run.train_step(next(batches)))
        if first and run.step % int(every.get("i_log", 100)) == 0:
            log.write(run.step, run.batch, len(pool))
        if first and run.step % int(every.get("i_sample", 1000)) == 0:
            preview(run, pool, args.out / f"{name}.jpg", args.vae)
        if args.minutes is not None and (world == 1 or run.step % 10 == 0):
            left = args.minutes - (time.monotonic() - started) / 60
            if world > 1:  # all cool down and stop at the same step
                least = torch.tensor(left, device=device)
                dist.all_reduce(least, dist.ReduceOp.MIN)
                left = float(least)
            over = left < 0
            run.cooled = min(1.0, max(left, 0.0) / args.cooldown) if args.cooldown else 1.0
        due = time.monotonic() - saved > 60 * args.save_minutes or run.step % int(every.get("i_save", 1000)) == 0
        if first and (due or over or run.step == last):
            run.save_average(args.out / f"{name}.safetensors")
            if state is not None:
                run.save_state(state)
            saved = time.monotonic()
        if over:
            break
    if first:
        preview(run, pool, args.out / f"{name}.jpg", args.vae)
    batches.close()


if __name__ == "__main__":
    main(sys.argv[1:])
