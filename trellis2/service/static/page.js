// The page: sends the form, follows the job, shows its files. It calls the routes of the service and nothing else.

import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const image = $("image");
const key = $("key"); // only where the service asks for one
const stages = [...document.querySelectorAll("[data-stage]")];
const HASH = /^#job=([0-9a-f-]{36})$/;
const RETRY_MILLISECONDS = 1500;
const stillness = matchMedia("(prefers-reduced-motion: reduce)");

let followed = null; // { id, stop: AbortController } of the job that is shown
let addresses = []; // of files in memory, to be given back
let viewer = null;

// ---- The service

/** What went wrong, in the service's own sentence. status: of HTTP, 0 where nobody answered. */
class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Call a route; paths are taken relative to the page, which may be served below a prefix. */
async function ask(path, options = {}) {
  const headers = {};
  if (key?.value) {
    // Headers carry bytes: these are the key's in UTF-8.
    headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.value))}`;
  }
  let response;
  try {
    response = await fetch(new URL(`.${path}`, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service does not answer; check the connection and try again.");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Refused(response.status, answer.detail ?? `The service answered with ${response.status}.`);
  }
  return response;
}

/** JSON of a job. Seeds stay text: they may have more digits than a number keeps here. */
function parseJob(text) {
  return JSON.parse(text.replace(/"seed":\s*(-?\d+)/g, '"seed":"$1"'));
}

/** The states of a job as the service sends them, until it has ended or the connection has. */
async function* jobEvents(id, signal) {
  // Not an EventSource, which cannot send a key.
  const response = await ask(`/api/v1/jobs/${id}/events`, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const line of blocks.flatMap((block) => block.split("\n"))) {
      if (line.startsWith("data: ")) yield parseJob(line.slice(6));
    }
  }
}

// ---- Saying things

function say(text) {
  // Set only when it changes: screen readers read it out each time.
  if ($("status").textContent !== text) $("status").textContent = text;
}

/** Show what is wrong, beside the input that the sentence begins with or else beside the state of the job. */
function complain(text, input = null) {
  const alert = $("alert");
  const culprit = input ?? form.elements[/^\w+(?==)/.exec(text)?.[0]];
  (culprit?.closest(".field, .drop") ?? $("status")).after(alert);
  alert.textContent = text;
  alert.hidden = false;
  if (culprit) {
    culprit.setAttribute("aria-invalid", "true");
    const details = culprit.closest("details");
    if (details) details.open = true;
    culprit.focus();
  }
  alert.scrollIntoView({ block: "nearest" });
}

function forgiveAll() {
  $("alert").hidden = true;
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

// ---- The picture

function choose(file) {
  const files = new DataTransfer();
  files.items.add(file);
  image.files = files.files;
  showChosen();
}

function showChosen() {
  const file = image.files[0];
  const picture = $("chosen");
  URL.revokeObjectURL(picture.src);
  picture.hidden = true;
  $("image-name").textContent = file ? file.name : "Choose a picture, or drop one here";
  if (file) picture.src = URL.createObjectURL(file);
}

$("chosen").addEventListener("load", () => ($("chosen").hidden = false));
image.addEventListener("change", showChosen);

// A picture dropped beside the frame would take the place of the page.
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, () => $("drop").classList.add("over"));
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));

for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", async () => {
    forgiveAll();
    try {
      const blob = await (await ask(`/examples/${example.dataset.name}`)).blob();
      choose(new File([blob], example.dataset.name, { type: blob.type }));
    } catch (error) {
      complain(error.message);
    }
  });
}

// ---- The form

form.addEventListener("input", ({ target }) => {
  const output = form.querySelector(`output[for="${target.id}"]`);
  if (output) output.textContent = target.value;
  target.removeAttribute("aria-invalid");
});

function wishes() {
  const body = new FormData();
  body.append("image", image.files[0]);
  for (const input of form.elements) {
    if (input.name) body.append(input.name, input.type === "checkbox" ? String(input.checked) : input.value);
  }
  body.append("wait", "false");
  return body;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  forgiveAll();
  const file = image.files[0];
  if (!file) return complain("Choose a picture first.", image);
  const most = Number(form.dataset.maxBytes);
  if (file.size > most) {
    // The service would hang up in the middle of it, and its sentence would be lost.
    return complain(`The picture has more than the ${Math.floor(most / 2 ** 20)} MB that are allowed.`, image);
  }
  $("submit").disabled = true;
  say("Sending the picture.");
  try {
    const response = await ask("/api/v1/image-to-3d", { method: "POST", body: wishes() });
    const job = parseJob(await response.text());
    history.replaceState(null, "", `#job=${job.job_id}`);
    $("job-title").focus();
    follow(job.job_id);
  } catch (error) {
    $("submit").disabled = false;
    $("submit").focus({ preventScroll: true });
    say("Nothing was started.");
    complain(error.message, error.status === 401 ? key : null);
  }
});

// ---- The job

const isOpen = (job) => job.status === "queued" || job.status === "running";

/** Show a job until it has ended; it goes on by itself when this page is left. */
async function follow(id) {
  followed?.stop.abort();
  const stop = new AbortController();
  followed = { id, stop };
  forgiveAll();
  clearResults();
  for (let job = null; !job || isOpen(job); ) {
    try {
      for await (job of jobEvents(id, stop.signal)) {
        // What was read but not shown yet when the page turned to another job
        if (stop.signal.aborted) return;
        showJob(job);
      }
      if (job && !isOpen(job)) break;
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error.status >= 400 && error.status < 500) {
        closeJob();
        say("There is nothing to show.");
        return complain(error.message, error.status === 401 ? key : null);
      }
    }
    say("The connection to the service was lost; trying again. The job goes on.");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
    if (stop.signal.aborted) return;
  }
}

function showJob(job) {
  const open = isOpen(job);
  $("submit").disabled = open;
  $("running").hidden = !open;
  $("stages").hidden = false;
  $("progress").value = job.progress;
  $("cancel").disabled = job.cancelling;
  $("cancel").textContent = job.cancelling ? "Stopping" : "Cancel";
  showStages(job);
  say(job.cancelling && open ? "Stopping after the current step." : sentence(job));
  if (!open) showEnd(job);
}

function sentence(job) {
  const current = stages.find((item) => item.dataset.stage === job.stage);
  return current ? `Running: ${current.firstElementChild.textContent}` : job.message;
}

function showStages(job) {
  const at = stages.findIndex((item) => item.dataset.stage === job.stage);
  stages.forEach((item, number) => {
    const { stage } = item.dataset;
    const [, bar, note] = item.children;
    const done = job.status === "completed" || number < at;
    const current = number === at;
    item.hidden = job.options[`generate_${stage}`] === false;
    item.toggleAttribute("aria-current", false);
    if (current) item.setAttribute("aria-current", "step");
    if (done) bar.value = 1;
    else if (current) bar.value = job.steps ? job.step / job.steps : 0;
    else if (isOpen(job)) bar.value = 0;
    if (stage in job.timings) note.textContent = `${job.timings[stage].toFixed(1)} s`;
    else note.textContent = current && job.steps > 1 ? `${job.step} of ${job.steps}` : "";
  });
}

function closeJob() {
  $("submit").disabled = false;
  $("running").hidden = true;
  history.replaceState(null, "", location.pathname + location.search);
}

async function showEnd(job) {
  const here = $("job").contains(document.activeElement) || document.activeElement === document.body;
  if (job.status !== "completed") {
    closeJob();
    if (here) $("job-title").focus();
    if (job.error) complain(job.error);
    return;
  }
  $("results").hidden = false;
  const seconds = Object.values(job.timings).reduce((sum, value) => sum + value, 0);
  $("facts").textContent = `Seed ${job.seed}, ${job.options.pipeline_type}, ${seconds.toFixed(1)} s.`;
  $("warnings").replaceChildren(
    ...job.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
  );
  $("warnings").hidden = job.warnings.length === 0;
  if (here) $("results-title").focus();
  const files = [
    ["cutout", job.preview_image_url, showPicture],
    ["video", job.video_url, showVideo],
    ["model", job.model_url, showModel],
  ];
  for (const [id, path, show] of files) {
    if (!path || followed.id !== job.job_id) continue;
    try {
      await showFile($(id), path, show);
    } catch (error) {
      complain(error.message);
    }
  }
}

/** Load a file once, for showing and for saving; a key cannot be sent along with an address in the page. */
async function showFile(figure, path, show) {
  const blob = await (await ask(path)).blob();
  const address = URL.createObjectURL(blob);
  addresses.push(address);
  figure.querySelector("a").href = address;
  figure.hidden = false;
  await show(figure, address, blob);
}

function showPicture(figure, address) {
  figure.querySelector("img").src = address;
}

function showVideo(figure, address) {
  const video = figure.querySelector("video");
  video.src = address;
  // A browser that does not let it begin leaves that to its reader.
  if (!stillness.matches) video.play().catch(() => {});
}

async function showModel(figure, address, blob) {
  viewer ??= new Viewer($("canvas"), (turning) => $("turn").setAttribute("aria-pressed", String(turning)));
  await viewer.show(await blob.arrayBuffer());
}

function clearResults() {
  $("results").hidden = true;
  viewer?.clear();
  for (const figure of document.querySelectorAll("figure")) {
    figure.hidden = true;
    figure.querySelector("a").removeAttribute("href");
    figure.querySelector("img, video")?.removeAttribute("src");
  }
  document.querySelector("video").load();
  addresses.forEach((address) => URL.revokeObjectURL(address));
  addresses = [];
}

$("turn").addEventListener("click", () => viewer?.turn(!viewer.turning));

$("cancel").addEventListener("click", async () => {
  $("cancel").disabled = true;
  try {
    await ask(`/api/v1/jobs/${followed.id}/cancel`, { method: "POST" });
  } catch (error) {
    $("cancel").disabled = false;
    complain(error.message);
  }
});

// ---- The start

if (key) {
  key.value = sessionStorage.getItem("key") ?? "";
  key.addEventListener("change", () => sessionStorage.setItem("key", key.value));
}

function followAddress() {
  const id = HASH.exec(location.hash)?.[1];
  if (id && id !== followed?.id) follow(id);
}

window.addEventListener("hashchange", followAddress);
followAddress();

async function sayWhenReady() {
  for (;;) {
    const health = await fetch(new URL("./health", document.baseURI)).then((answer) => answer.json(), () => null);
    if (followed || !health) return;
    if (health.status === "unhealthy") return complain(health.message);
    if (health.model_loaded) return say("Choose a picture, then press Make 3D.");
    say(`${health.message} Jobs may be sent already; they wait.`);
    await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
  }
}

sayWhenReady();
