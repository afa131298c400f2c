"""Examples of calls, each of which waits for its asset:

    python sync_client_examples.py [EXAMPLE...]

EXAMPLE: quick, best, model_only, several, at_once, cancelled or refused; without one it is quick.  Start the service
first: ``python api.py``; if it is elsewhere or asks for a key, set TRELLIS2_URL and TRELLIS2_API_KEY.
"""

from __future__ import annotations

import asyncio
import os
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

from client_examples import EXAMPLE, AsyncTRELLIS2Client, BadRequest, JobCancelled, TRELLIS2Client, multipart

URL = os.environ.get("TRELLIS2_URL", "http://localhost:8000")
KEY = os.environ.get("TRELLIS2_API_KEY")
client = TRELLIS2Client(URL, KEY)


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


def quick() -> None:
    """One request, one answer, with nothing but the standard library: the connection stays open until the end."""
    kind, body = multipart("T.png", EXAMPLE.read_bytes(), {"pipeline_type": "512", "texture_size": 1024})
    request = urllib.request.Request(f"{URL}/api/v1/image-to-3d", body, {"Content-Type": kind, **client.headers})
    with urllib.request.urlopen(request) as response:
        say(response.read().decode())


def best() -> None:
    """The finest preset with more steps than usual."""
    steps: dict[str, Any] = {"sparse_structure_steps": 20, "shape_slat_steps": 20, "tex_slat_steps": 20}
    result = client.image_to_3d(EXAMPLE, pipeline_type="1536_cascade", **steps)
    say(client.download_file(result["model_url"], "best.glb"))


def model_only() -> None:
    """No video, few triangles, small textures; the files are deleted from the service afterwards."""
    result = client.image_to_3d(
        EXAMPLE, pipeline_type="512", generate_video=False, decimation_target=100_000, texture_size=1024
    )
    say(client.download_file(result["model_url"], "model_only.glb"))
    client.delete_outputs(result["job_id"])


def several() -> None:
    """Three seeds, queued at once, so that the service is never idle between them."""
    settings: dict[str, Any] = {"pipeline_type": "512", "texture_size": 1024, "generate_video": False}
    jobs = [client.submit(EXAMPLE, seed=seed, **settings) for seed in (1, 2, 3)]
    for job in jobs:
        result = client.wait(job)
        say(client.download_file(result["model_url"], f"seed_{result['seed']}.glb"))


def at_once() -> None:
    """The same from a program that does other things meanwhile, with asyncio."""

    async def make(service: AsyncTRELLIS2Client, seed: int) -> None:
        settings: dict[str, Any] = {"pipeline_type": "512", "texture_size": 1024, "generate_video": False}
        result = await service.image_to_3d(EXAMPLE, seed=seed, **settings)
        say(await service.download_file(result["model_url"], f"seed_{seed}.glb"))

    async def make_all() -> None:
        service = AsyncTRELLIS2Client(URL, KEY)
        await asyncio.gather(*(make(service, seed) for seed in (1, 2, 3)))

    asyncio.run(make_all())


def cancelled() -> None:
    """Start, think better of it."""
    job = client.submit(EXAMPLE)
    client.cancel(job["job_id"])
    try:
        client.wait(job)
    except JobCancelled as error:
        say(error)


def refused() -> None:
    """What cannot be used is answered with a sentence."""
    try:
        client.image_to_3d(EXAMPLE, texture_size=100)
    except BadRequest as error:
        say(f"{error.status}: {error}")


EXAMPLES: dict[str, Callable[[], None]] = {
    example.__name__: example for example in (quick, best, model_only, several, at_once, cancelled, refused)
}

if __name__ == "__main__":
    for name in sys.argv[1:] or ["quick"]:
        if name not in EXAMPLES:
            sys.exit(f"{name} is no example; they are {', '.join(EXAMPLES)}.")
        EXAMPLES[name]()
