"""Make training data: python -m training.make_data --out FOLDER [--workers N] [--device cuda]

Worker processes write one numbered .npz after the other until they are stopped or ``--count`` are there; training reads
them as they come.  The same numbers give the same objects.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trellis2.options import ENVIRONMENTS

from .data import COARSE, LIGHTS, PICTURE, SHARDS, build, draw, draw_view, load_lights, save_light

logger = logging.getLogger("training")


def make_one(index: int, args: argparse.Namespace) -> None:
    """Write object ``index`` of a split, if it is not there yet."""
    path = args.out / f"{index:07d}.npz"
    if path.exists():
        return
    family, seed = draw(args.split, index)
    rng = np.random.default_rng([seed, 5])
    resolution = 1024 if rng.random() < args.fine else 512
    if args.flows and index % SHARDS < SHARDS // 2:  # so that batches have as many of both
        resolution = COARSE
    views = [draw_view(rng) for _ in range(args.views)]
    sample = build(family, seed, resolution, views, args.device, args.picture, with_splits=not args.flows)
    sample.save(path, compress=not args.flows)


def _work(worker: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    load_lights(args.out, args.device)
    started = time.monotonic()
    for index in range(args.first + worker, args.first + args.count, args.workers):
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            return
        try:
            make_one(index, args)
        except Exception:
            logger.exception("object %d was left out", index)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="training.make_data", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--first", type=int, default=0, help="number of the first object")
    parser.add_argument("--count", type=int, default=1 << 24)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop after this many minutes")
    parser.add_argument("--views", type=int, default=4, help="pictures of each object")
    parser.add_argument("--fine", type=float, default=0.0, help="share of objects at resolution 1024 instead of 512")
    parser.add_argument(
        "--flows",
        action="store_true",
        help=f"for encode alone: every other object at resolution {COARSE}, which says as much of the structure; no "
        "diagonals, which only the shape VAE learns; files larger and sooner written",
    )
    parser.add_argument("--picture", type=int, default=PICTURE, help="side of a picture, in pixels")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers' libraries
    # Once here, so that the workers find their kernels compiled and the lights made.
    args.device = str(torch.empty(0, device=args.device).device)
    context = multiprocessing.get_context("spawn")
    numbers = range(LIGHTS + len(ENVIRONMENTS))
    with context.Pool(min(args.workers, len(numbers))) as pool:
        pool.starmap(save_light, [(args.out, number, args.device) for number in numbers], chunksize=1)
    load_lights(args.out, args.device)
    build("mushroom", 0, 32, [replace(draw_view(np.random.default_rng(0)), light=0)], args.device)
    workers = [context.Process(target=_work, args=(k, args)) for k in range(args.workers)]
    for worker in workers:
        worker.start()
    started = time.monotonic()
    while any(worker.is_alive() for worker in workers):
        workers[0].join(30)
        made = sum(1 for _ in args.out.glob("*.npz"))
        logger.info("%d objects, %.0f s", made, time.monotonic() - started)


if __name__ == "__main__":
    main(sys.argv[1:])
