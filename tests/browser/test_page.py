"""The page in Chromium, as people use it: with keys, on a phone, without a network, and the documented JavaScript.

Nothing here may ask another host for anything: the browser resolves no names, and every request is looked at.
"""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image, ImageChops
from service_client import DOCUMENTED_JAVASCRIPT

from trellis2.image import MAX_BYTES
from trellis2.pipeline import STAGE_WEIGHTS
from trellis2.service.app import create_app
from trellis2.service.page import EXAMPLES, STAGES
from trellis2.service.settings import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

FRAMES, SIDE = 8, 96
DESKTOP, PHONE = {"width": 1100, "height": 800}, {"width": 390, "height": 844}
SECONDS = 1000  # playwright counts in milliseconds

CALL = """async () => {
  DOCUMENTED
  const picture = await (await fetch('/T.png')).blob();
  const model = await generateModel(new File([picture], 'T.png'));
  return Array.from(new Uint8Array(await model.slice(0, 4).arrayBuffer()), (c) => String.fromCharCode(c)).join('');
}"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(data: Path, **settings: Any) -> Iterator[str]:
    """The service in a thread of this process, with the embedded model; gives its address."""
    port = free_port()
    video = {"video_frames": FRAMES, "video_resolution": SIDE}
    app = create_app(Settings(data=data, video=video, **settings))
    config = uvicorn.Config(app, port=port, log_config=None, ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRELLIS2_MODEL", str(ROOT / "weights" / "embedded"))
        thread.start()
        while not server.started or not app.state.service.worker.loaded:
            assert thread.is_alive()
            time.sleep(0.05)
    try:
        yield f"http://localhost:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """The origin of a site of somebody else, which has the example pictures."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/favicon.ico":  # browsers ask for it, whatever the page is
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

    handler = functools.partial(Quiet, directory=str(EXAMPLES))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, elsewhere: str) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("page"), cors_origins=(elsewhere,)) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    arguments = [
        "--use-gl=angle",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    ]
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page(chromium: Any) -> Iterator[OpenPage]:
    """``open_page(address)``: a new tab; in the end it must have asked nobody else and have had no error."""
    contexts = []
    trouble: list[str] = []

    def opened(address: str, *, also: str = "", complaints: tuple[str, ...] = (), **settings: Any) -> Any:
        """also: may be asked too. complaints: parts of messages in the console that refused requests lead to."""
        context = chromium.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce"} | settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120 * SECONDS)

        def look(request: Any) -> None:
            if not request.url.startswith((address, f"blob:{address}", also or address)):
                trouble.append(f"asked for {request.url}")

        def hear(message: Any) -> None:
            if message.type == "error" and not any(part in message.text for part in complaints):
                trouble.append(message.text)

        context.on("request", look)
        page.on("console", hear)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def tab_to(page: Any, wanted: str) -> None:
    """Go on with the Tab key until the element has the focus, which must show."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("(wanted) => document.activeElement.matches(wanted)", wanted):
            outline = "getComputedStyle(document.activeElement.closest('.drop') ?? document.activeElement).outlineStyle"
            assert page.evaluate(outline) != "none", wanted
            return
    raise AssertionError(f"{wanted} is not reached with the Tab key")


def wait_until(page: Any, expression: str) -> None:
    """As wait_for_function does, which the page's policy against evaluated scripts stops."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def picture_of(page: Any, selector: str) -> Image.Image:
    return Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")


def differ(first: Image.Image, second: Image.Image) -> bool:
    """Whether at least one pixel in fifty is visibly another one."""
    changed = ImageChops.difference(first, second).convert("L").point(lambda value: 255 * (value > 12))
    return first.size != second.size or changed.histogram()[255] * 50 > first.width * first.height


def no_horizontal_scroll(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def job_of(page: Any, service: str) -> Any:
    job_id = page.url.partition("#job=")[2]
    with urllib.request.urlopen(f"{service}api/v1/jobs/{job_id}") as answer:
        return json.load(answer)


def get(service: str, path: str) -> bytes:
    with urllib.request.urlopen(service.rstrip("/") + path) as answer:
        return bytes(answer.read())


WATCH = """() => {
  window.seen = { progress: [], status: [], stages: new Set() };
  const look = () => {
    seen.progress.push(document.getElementById("progress").value);
    seen.status.push(document.getElementById("status").textContent);
    document.querySelectorAll("[aria-current]").forEach((item) => seen.stages.add(item.dataset.stage));
  };
  const options = { subtree: true, childList: true, attributes: true, characterData: true };
  new MutationObserver(look).observe(document.getElementById("job"), options);
}"""


def test_from_an_example_to_the_files_with_the_keyboard(open_page: OpenPage, service: str) -> None:
    page = open_page(service)
    page.evaluate(WATCH)
    tab_to(page, "[data-name='T.png']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chosen:not([hidden])")
    tab_to(page, "#pipeline_type")
    page.keyboard.press("Home")  # 512
    tab_to(page, "#seed")
    page.keyboard.type(str(2**53 + 1))  # a seed that JavaScript's numbers do not hold
    tab_to(page, "summary")
    page.keyboard.press("Enter")
    tab_to(page, "#sparse_structure_steps")
    page.keyboard.press("ArrowLeft")
    assert page.text_content("output[for=sparse_structure_steps]") == "11"
    tab_to(page, "#decimation_target")
    page.keyboard.type("100000")
    tab_to(page, "#texture_size")
    page.keyboard.type("1024")
    tab_to(page, "#submit")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model:not([hidden])")

    seen = page.evaluate("({ ...seen, stages: [...seen.stages] })")
    assert page.evaluate("document.activeElement.id") == "results-title"
    assert seen["progress"] == sorted(seen["progress"])
    assert len(set(seen["progress"])) >= 4
    assert len({text for text in seen["status"] if text.startswith("Running: ")}) >= 3
    assert {"model", "video"} <= set(seen["stages"]) <= set(STAGES)
    assert page.text_content("#status") == "3D generation completed successfully"
    assert page.text_content("#facts").startswith(f"Seed {2**53 + 1}, 512, ")

    job = job_of(page, service)
    assert job["seed"] == 2**53 + 1
    chosen = {name: job["options"][name] for name in ("sparse_structure_steps", "decimation_target", "texture_size")}
    assert chosen == {"sparse_structure_steps": 11, "decimation_target": 100000, "texture_size": 1024}

    check_cutout_and_video(page)
    check_canvas(page)
    for name, address in (("glb", "model_url"), ("mp4", "video_url"), ("png", "preview_image_url")):
        with page.expect_download() as download:
            page.click(f"a[download$='.{name}']")
        assert Path(download.value.path()).read_bytes() == get(service, job[address])
        assert download.value.suggested_filename == job[address].rpartition("/")[2]
    page.set_viewport_size(PHONE)
    assert no_horizontal_scroll(page)

    # The address names the job: who comes back finds it.
    page.reload()
    page.wait_for_selector("#model:not([hidden])")
    assert page.text_content("#facts").startswith(f"Seed {2**53 + 1}, ")


def check_cutout_and_video(page: Any) -> None:
    assert page.evaluate("document.querySelector('#cutout img').naturalWidth") > 100
    wait_until(page, "document.querySelector('video').readyState >= 2")
    video = page.evaluate("(v => [v.videoWidth, v.duration, v.paused])(document.querySelector('video'))")
    assert video == [SIDE, pytest.approx(FRAMES / 15, abs=0.05), True]  # paused: less motion was asked for
    page.evaluate("document.querySelector('video').play()")
    wait_until(page, "document.querySelector('video').currentTime > 0.1")
    page.evaluate("document.querySelector('video').pause()")


def check_canvas(page: Any) -> None:
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    still = picture_of(page, "#canvas")
    empty = Image.new("RGB", still.size, still.getpixel((still.width // 2, 8)))
    assert differ(still, empty), "the canvas is blank"
    assert not differ(still, picture_of(page, "#canvas")), "it turns, though less motion was asked for"
    canvas.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    turned = picture_of(page, "#canvas")
    assert differ(still, turned)
    for _ in range(4):
        page.keyboard.press("+")
    closer = picture_of(page, "#canvas")
    assert differ(turned, closer)
    page.keyboard.press("Home")
    assert not differ(still, picture_of(page, "#canvas"))
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.6, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, middle, steps=4)
    page.mouse.up()
    dragged = picture_of(page, "#canvas")
    assert differ(still, dragged)
    assert page.get_attribute("#turn", "aria-pressed") == "false"
    page.click("#turn")
    time.sleep(1.5)
    assert differ(dragged, picture_of(page, "#canvas")), "it does not turn by itself"
    page.click("#turn")
    assert page.get_attribute("#turn", "aria-pressed") == "false"


def test_a_reload_leaves_the_job_alone_and_cancel_ends_it(open_page: OpenPage, service: str) -> None:
    page = open_page(service)
    page.set_input_files("#image", EXAMPLES / "mug.png")
    for name in ("sparse_structure_steps", "shape_slat_steps", "tex_slat_steps"):
        page.evaluate("(name) => document.getElementById(name).value = 50", name)
    page.click("#submit")
    page.wait_for_selector("[aria-current]")
    page.reload()
    page.wait_for_selector("[aria-current]")
    assert job_of(page, service)["status"] == "running"
    assert page.is_disabled("#submit")
    address = page.url
    start = time.monotonic()
    page.click("#cancel")
    page.wait_for_selector("#running", state="hidden")
    assert time.monotonic() - start < 10
    assert page.text_content("#status") == "3D generation cancelled"
    assert page.is_enabled("#submit")
    assert page.is_hidden("#results")
    job_id = address.partition("#job=")[2]
    assert json.loads(get(service, f"/api/v1/jobs/{job_id}"))["status"] == "cancelled"


def test_what_is_wrong_is_said(open_page: OpenPage, service: str, tmp_path: Path) -> None:
    page = open_page(service, complaints=("the server responded with a status of 4",))

    def refused() -> str:
        page.click("#submit")
        page.wait_for_selector("#alert:not([hidden])")
        assert page.is_enabled("#submit")
        assert page.get_attribute("#alert", "role") == "alert"
        return str(page.text_content("#alert"))

    assert refused() == "Choose a picture first."
    assert page.evaluate("document.activeElement.id") == "image"

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    page.set_input_files("#image", broken)
    assert "PNG" in refused()
    assert page.text_content("#image-name") == "broken.png"

    page.set_input_files("#image", EXAMPLES / "T.png")
    page.evaluate("document.getElementById('texture_size').value = 100")
    assert refused() == "texture_size=100 must be a whole number from 1024 to 8192."
    assert page.evaluate("document.activeElement.id") == "texture_size"  # although it was folded away
    assert page.get_attribute("#texture_size", "aria-invalid") == "true"

    # A job that fails: the picture can be read, but shows nothing.
    flat = tmp_path / "flat.png"
    Image.new("RGB", (64, 64), "red").save(flat)
    page.evaluate("document.getElementById('texture_size').value = 1024")
    page.set_input_files("#image", flat)
    assert refused().startswith("The picture shows a single colour;")

    page.goto("about:blank")  # otherwise the address changes within the open page, which clears it when it answers
    page.goto(service + "#job=00000000-0000-0000-0000-000000000000")
    page.wait_for_selector("#alert:not([hidden])")
    assert page.text_content("#alert") == "There is no such job; it may have been removed because of its age."


DROP = """([size, target]) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([new Uint8Array(size)], `${size}.png`));
  const drop = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
  document.querySelector(target).dispatchEvent(drop);
  return drop.defaultPrevented;  // else the browser shows the picture instead of the page
}"""


def test_pictures_are_dropped_and_large_ones_not_sent(open_page: OpenPage, service: str) -> None:
    page = open_page(service)
    assert page.evaluate(DROP, [5, "#drop"])
    assert page.text_content("#image-name") == "5.png"
    assert page.evaluate(DROP, [MAX_BYTES + 1, "body"])
    assert page.text_content("#image-name") == f"{MAX_BYTES + 1}.png"
    page.click("#submit")
    page.wait_for_selector("#alert:not([hidden])")
    assert page.text_content("#alert") == f"The picture has more than the {MAX_BYTES // 2**20} MB that are allowed."
    assert page.text_content("#status") == "Choose a picture, then press Make 3D."


NAMELESS = """() => [...document.querySelectorAll("input, select, button, a, canvas, progress, video, summary, ol, ul")]
  .filter((element) => !(element.getAttribute("aria-label") || element.labels?.[0]?.textContent.trim()
    || (element.matches("button, a, summary") && element.textContent.trim())))
  .map((element) => element.outerHTML)"""
DANGLING = """() => [...document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for], output[for]")]
  .flatMap((element) => ["aria-describedby", "aria-labelledby", "for"].map((name) => element.getAttribute(name)))
  .filter((id) => id && !document.getElementById(id)?.textContent.trim() && !document.getElementById(id)?.id)"""
REPEATED = """() => [...document.querySelectorAll("[id]")].map((element) => element.id)
  .filter((id, place, all) => all.indexOf(id) !== place)"""


def test_everything_has_a_name(open_page: OpenPage, service: str) -> None:
    page = open_page(service)
    assert page.evaluate("document.querySelectorAll('form input, form select').length") >= 15
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(DANGLING) == []
    assert page.evaluate(REPEATED) == []
    assert page.get_attribute("html", "lang") == "en"
    assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")
    assert page.get_attribute("#status", "role") == "status"
    titles = page.evaluate("[...document.querySelectorAll('h1, h2')].map((title) => title.tagName).join(' ')")
    assert titles == "H1 H2 H2"


@pytest.mark.parametrize("viewport", [PHONE, {"width": 320, "height": 640}, DESKTOP])
def test_nothing_is_wider_than_the_screen(open_page: OpenPage, service: str, viewport: dict[str, int]) -> None:
    page = open_page(service, viewport=viewport)
    page.set_input_files("#image", {"name": "x" * 200 + ".png", "mimeType": "image/png", "buffer": b"?"})
    page.click("summary")
    page.evaluate("document.querySelectorAll('[hidden]').forEach((element) => element.hidden = false)")
    assert no_horizontal_scroll(page)
    columns = page.evaluate("new Set([...document.querySelector('main').children].map((e) => e.offsetLeft)).size")
    assert columns == (1 if viewport["width"] < 900 else 2)


def test_a_service_with_keys_asks_for_one(open_page: OpenPage, tmp_path: Path) -> None:
    with served(tmp_path, api_keys=("schlüssel",)) as service:
        page = open_page(service, complaints=("401",))
        page.set_input_files("#image", EXAMPLES / "T.png")
        page.click("#submit")
        page.wait_for_selector("#alert:not([hidden])")
        assert page.text_content("#alert") == "Send a valid key: Authorization: Bearer KEY."
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.get_attribute("#key", "type") == "password"
        page.keyboard.type("schlüssel")
        page.select_option("#pipeline_type", "512")
        page.uncheck("#generate_video")
        page.uncheck("#generate_model")
        page.click("#submit")
        page.wait_for_selector("#cutout:not([hidden])")
        assert page.is_hidden("#model")
        assert page.is_hidden("[data-stage=video]")
        page.reload()  # the tab keeps the key
        page.wait_for_selector("#cutout:not([hidden])")


@pytest.mark.parametrize("allowed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_documented_javascript_from_another_site(
    open_page: OpenPage, service: str, elsewhere: str, allowed: bool
) -> None:
    # The other name of the same machine is another origin, which TRELLIS2_CORS_ORIGINS does not name.
    site = elsewhere if allowed else elsewhere.replace("127.0.0.1", "localhost")
    page = open_page(site + "/T.png", also=service, complaints=() if allowed else ("CORS policy", "net::ERR_FAILED"))
    code = CALL.replace("DOCUMENTED", DOCUMENTED_JAVASCRIPT).replace("http://localhost:8000", service.rstrip("/"))
    if allowed:
        assert page.evaluate(code) == "glTF"
    else:
        with pytest.raises(playwright.Error, match="Failed to fetch"):
            page.evaluate(code)


def test_the_stages_are_those_of_the_pipeline() -> None:
    assert list(STAGES) == list(STAGE_WEIGHTS)
