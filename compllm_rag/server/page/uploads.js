// Files on their way in: sent one after another, then watched until their concepts are made.
import { get, upload } from "./api.js";
import { announce, byId, make } from "./dom.js";
import { bytes, many, sentence } from "./words.js";

const POLL_MS = 800;
const WATCHED_AT_ONCE = 4; // the server works in order: later ones cannot be ready before these
const PATIENT_CODES = new Set(["rate_limited", "upload_queue_full", "overloaded", "storage_locked"]);

const items = [];
let sending = false;
let polling = false;
let limit = Infinity;
let changed = () => undefined;

/**
 * Wire the list of uploads.
 * @param {() => void} onChange Called when there are documents, or concepts, that were not there before.
 */
export function setUpUploads(onChange) {
  changed = onChange;
  const files = byId("files");
  files.addEventListener("change", () => {
    add([...files.files].map((file) => ({ file, name: file.name })));
    files.value = ""; // so that the same file can be chosen again
  });
  byId("uploads-clear").addEventListener("click", () => {
    for (const item of items.filter((each) => each.ended)) drop(item);
    byId("files").focus();
    refresh();
  });
  byId("uploads-stop").addEventListener("click", () => {
    for (const item of items) item.stop.abort();
    byId("files").focus();
  });
}

/** Heed what the server says of itself. */
export function limitUploads(mostBytes) {
  limit = mostBytes;
}

/** Stop, and take the list away. */
export function forgetUploads() {
  for (const item of [...items]) {
    item.stop.abort();
    item.ended = true;
    drop(item);
  }
  refresh();
}

/** Send these files, after those that wait already. */
export function add(files) {
  for (const { file, name } of files) {
    const item = newItem(file, name);
    items.push(item);
    byId("upload-list").append(item.node);
    if (file.size > limit) end(item, `Too large: ${bytes(file.size)}. The server takes up to ${bytes(limit)} at once.`, true);
  }
  refresh();
  send();
}

function newItem(file, name) {
  const state = make("span", { class: "hint", text: "Waiting to be sent" });
  const progress = make("progress", { max: 1, value: 0, "aria-label": `Progress of ${name}` });
  const node = make("li", {}, make("span", { class: "title", dir: "auto", text: name }), progress, state);
  return { file, name, node, state, progress, stop: new AbortController(), sent: false, ended: false, job: null };
}

async function send() {
  if (sending) return;
  sending = true;
  for (let item = next(); item; item = next()) {
    item.sent = true;
    await sendOne(item);
    refresh();
  }
  sending = false;
}

function next() {
  return items.find((item) => !item.sent && !item.ended);
}

async function sendOne(item) {
  try {
    const accepted = await patiently(item, () => upload(item.file, item.name, (share) => sent(item, share), item.stop.signal));
    const skipped = accepted.skipped.map((one) => `${one.name}: ${one.reason}`).join("; ");
    item.skipped = skipped ? ` Left out: ${skipped}.` : "";
    changed();
    if (accepted.changed === 0) {
      end(item, `Was there already.${item.skipped}`);
    } else {
      item.job = accepted.job_id;
      item.chunks = accepted.chunks;
      compressing(item, accepted.chunks_waiting);
      announce(`${item.name} can be asked about: ${many(accepted.chunks, "chunk")}.`);
      poll();
    }
  } catch (error) {
    if (item.stop.signal.aborted) end(item, "Stopped. It was not sent completely.");
    else end(item, sentence(error), true);
  }
}

/** Try again for as long as the server only asks for patience. */
async function patiently(item, attempt) {
  for (;;) {
    try {
      item.stop.signal.throwIfAborted();
      return await attempt();
    } catch (error) {
      if (!PATIENT_CODES.has(error.code)) throw error;
      item.state.textContent = sentence(error).replace("Try again", "It is tried again");
      await pause(1000 * Math.max(1, error.retryAfter), item.stop.signal);
    }
  }
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

function sent(item, share) {
  if (share < 1) {
    item.progress.value = share;
    item.state.textContent = `Sending, ${Math.floor(100 * share)} %`;
  } else {
    item.progress.removeAttribute("value"); // how long reading and cutting take is not known beforehand
    item.state.textContent = "Reading and cutting into chunks";
  }
}

function compressing(item, waiting) {
  const done = Math.max(0, item.chunks - waiting);
  item.progress.value = item.chunks ? done / item.chunks : 1;
  item.state.textContent = `Compressing: ${done} of ${many(item.chunks, "chunk")}`;
}

/** Ask after jobs until none is left. */
async function poll() {
  if (polling) return;
  polling = true;
  for (let watched = jobs(); watched.length; watched = jobs()) {
    await pause(POLL_MS);
    if (document.hidden) continue; // nobody looks
    for (const item of watched.slice(0, WATCHED_AT_ONCE)) await look(item);
    refresh();
  }
  polling = false;
}

function jobs() {
  return items.filter((item) => item.job && !item.ended);
}

async function look(item) {
  try {
    const job = await get(`v1/jobs/${encodeURIComponent(item.job)}`);
    item.chunks = job.chunks;
    if (job.state === "waiting") {
      compressing(item, job.chunks_waiting);
    } else if (job.state === "failed") {
      end(item, `${many(job.chunks_failed, "chunk")} could not be compressed and stay text.${item.skipped}`, true);
      changed();
    } else {
      end(item, `Ready: ${many(job.chunks, "chunk")}.${item.skipped}`);
      changed();
    }
  } catch (error) {
    // The server may be busy or gone for a while; only a job that it does not know ends the watch.
    if (error.code === "no_such_job") end(item, "It is in. The server was started again since; the list below tells its state.");
    else item.state.textContent = sentence(error);
  }
}

function end(item, text, bad = false) {
  if (item.ended) return;
  item.ended = true;
  item.state.textContent = text;
  item.node.classList.toggle("bad", bad);
  item.progress.remove();
  announce(`${item.name}: ${text}`);
  refresh();
}

function drop(item) {
  item.node.remove();
  items.splice(items.indexOf(item), 1);
}

function refresh() {
  byId("uploads").hidden = items.length === 0;
  byId("uploads-clear").hidden = !items.some((item) => item.ended);
  byId("uploads-stop").hidden = !items.some((item) => !item.ended && !item.job);
}
