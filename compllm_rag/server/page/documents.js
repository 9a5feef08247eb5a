// The list of documents, and what still waits for its concepts.
import { get, remove } from "./api.js";
import { announce, byId, closeOnBackdrop, make, tell } from "./dom.js";
import { openDocument } from "./reader.js";
import { count, many, sentence } from "./words.js";

const AT_ONCE = 50;
const BUSY_MS = 1500;
const IDLE_MS = 15000;

let next = null; // id after which the list goes on
let shown = 0;
let mayWrite = false;
let loading = 0; // of several loads only the latest is shown
let doomed = null; // what the confirmation is about

/** Wire the list; `load` fills it. */
export function setUpDocuments() {
  byId("documents-more").addEventListener("click", more);
  const dialog = byId("confirm");
  closeOnBackdrop(dialog);
  byId("confirm-no").addEventListener("click", () => dialog.close());
  byId("confirm-yes").addEventListener("click", () => {
    dialog.close();
    erase(doomed);
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) watchQueue();
  });
}

/** Whether each document has its button to delete it. */
export function allowChanges(allowed) {
  if (allowed !== mayWrite) byId("document-list").replaceChildren();
  mayWrite = allowed;
}

/** Take the list away. */
export function forgetDocuments() {
  loading += 1; // what is on its way is not shown any more
  clearTimeout(timer);
  byId("document-list").replaceChildren();
  took({ total: 0, next_after: null }, 0);
  byId("documents-empty").hidden = true;
  tell(byId("queue"), "");
}

/**
 * Show the documents from the first on, as many as were shown before.
 * @returns {Promise<number|null>} How many there are; null where that cannot be told.
 */
export async function load() {
  loading += 1;
  const mine = loading;
  try {
    const most = Math.min(500, Math.max(AT_ONCE, shown));
    const page = await get(`v1/documents?limit=${most}`);
    if (mine !== loading) return page.total;
    render(page.documents);
    took(page, page.documents.length);
    return page.total;
  } catch (error) {
    if (mine !== loading) return null;
    if (error.code === "no_such_namespace") {
      byId("document-list").replaceChildren();
      took({ total: 0, next_after: null }, 0);
      return 0;
    }
    tell(byId("documents-trouble"), error.status === 401 ? "" : sentence(error));
    return null;
  }
}

/** Show these; rows that stay are left where they are, so that nobody loses the one they are about to press. */
function render(documents) {
  const list = byId("document-list");
  const ids = new Set(documents.map((found) => found.id));
  const rows = new Map();
  for (const row of [...list.children]) {
    if (ids.has(row.dataset.id)) rows.set(row.dataset.id, row);
    else row.remove();
  }
  let at = list.firstElementChild; // rows and documents are both in order of id
  for (const found of documents) {
    const row = rows.get(found.id);
    if (!row) list.insertBefore(item(found), at);
    else if (row.dataset.signature !== signature(found)) refresh(row, found);
    at = row ? row.nextElementSibling : at;
  }
}

function signature(found) {
  return JSON.stringify([found.title, found.state, found.chunks, found.chunks_waiting]);
}

async function more() {
  const button = byId("documents-more");
  button.disabled = true;
  try {
    const page = await get(`v1/documents?limit=${AT_ONCE}&after=${encodeURIComponent(next)}`);
    const items = page.documents.map(item);
    byId("document-list").append(...items);
    took(page, shown + items.length);
    items[0]?.querySelector("button").focus();
  } catch (error) {
    tell(byId("documents-trouble"), sentence(error));
  }
  button.disabled = false;
}

function took(page, number) {
  next = page.next_after;
  shown = number;
  tell(byId("documents-trouble"), "");
  byId("documents-total").textContent = page.total ? count(page.total) : "";
  byId("documents-empty").hidden = page.total > 0;
  byId("documents-more").hidden = next === null;
}

function item(found) {
  const row = make("li", { "data-id": found.id });
  const open = make("button", {
    type: "button", class: "document-open",
    on: { click: (event) => openDocument(found.id, row.dataset.title, event.currentTarget) },
  }, make("span", { class: "title", dir: "auto" }));
  const erasing = make("button", {
    type: "button", class: "quiet", text: "Delete", on: { click: () => confirm(found.id, row.dataset.title) },
  });
  row.append(
    make("div", { class: "line" }, open, mayWrite ? erasing : ""),
    make("p", { class: "hint" }, make("span", { class: "id", dir: "auto", text: found.id }), make("span", { class: "how-far" })),
  );
  refresh(row, found);
  return row;
}

function refresh(row, found) {
  const title = found.title || found.id;
  row.dataset.title = title;
  row.dataset.state = found.state;
  row.dataset.signature = signature(found);
  row.querySelector(".title").textContent = title;
  row.querySelector(".quiet")?.setAttribute("aria-label", `Delete ${title}`);
  row.querySelector(".id").hidden = title === found.id;
  row.querySelector(".how-far").textContent = state(found);
}

function state(found) {
  if (found.state === "waiting") return `${count(found.chunks_waiting)} of ${many(found.chunks, "chunk")} to compress`;
  if (found.state === "failed") return `${many(found.chunks, "chunk")}, some stay text`;
  return many(found.chunks, "chunk");
}

function confirm(id, title) {
  doomed = { id, title };
  byId("confirm-title").textContent = `Delete ${title}?`;
  byId("confirm-text").textContent = "Its text, vectors and concepts are removed. This cannot be taken back.";
  byId("confirm").showModal();
}

async function erase(found) {
  try {
    await remove(`v1/documents/${encodeURIComponent(found.id)}`);
    announce(`${found.title} was deleted.`);
  } catch (error) {
    tell(byId("documents-trouble"), sentence(error));
  }
  await load();
  byId("documents").focus(); // the button that had the focus is gone
}

let timer = null;
let lastWaiting = 0;

/** Show what waits, again and again: soon while something does, seldom else. */
export async function watchQueue() {
  clearTimeout(timer);
  if (document.hidden) return;
  let waiting = 0;
  try {
    const queue = await get("v1/queue");
    waiting = queue.chunks_waiting;
    tell(byId("queue"), waiting
      ? `${many(waiting, "chunk")} of ${many(queue.documents_waiting, "document")} still to be compressed; read as text until then.`
      : "");
  } catch {
    tell(byId("queue"), ""); // whatever is wrong is told where somebody asked for something
  }
  if (waiting !== lastWaiting) load();
  lastWaiting = waiting;
  timer = setTimeout(watchQueue, waiting ? BUSY_MS : IDLE_MS);
}
