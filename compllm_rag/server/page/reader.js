// The dialog that shows a passage with what was kept of it, or a document with its chunks.
import { get } from "./api.js";
import { byId, closeOnBackdrop, make } from "./dom.js";
import { count, figure, many, percent, sentence } from "./words.js";

const CHUNKS_AT_ONCE = 50;

let request = null; // AbortController of what is being fetched
let opener = null;

/** Wire the dialog. */
export function setUpReader() {
  const dialog = byId("reader");
  closeOnBackdrop(dialog);
  byId("reader-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    request?.abort();
    opener?.focus();
  });
}

/**
 * Show a passage.
 * @param {string} nodeId
 * @param {Element} from What has the focus again once the dialog is closed.
 */
export function openPassage(nodeId, from) {
  opener = from;
  show("Passage", (signal) => passage(nodeId, signal));
}

/** Show a document. */
export function openDocument(id, title, from) {
  opener = from;
  show(title || id, (signal) => wholeDocument(id, signal));
}

async function show(title, fill) {
  request?.abort();
  request = new AbortController();
  const { signal } = request;
  const dialog = byId("reader");
  const body = byId("reader-body");
  byId("reader-title").textContent = title;
  body.replaceChildren(make("p", { class: "hint", text: "Loading…" }));
  if (!dialog.open) dialog.showModal();
  byId("reader-title").focus();
  try {
    const parts = await fill(signal);
    if (!signal.aborted) body.replaceChildren(...parts);
  } catch (error) {
    if (!signal.aborted) body.replaceChildren(make("p", { class: "notice bad", role: "alert", text: sentence(error) }));
  }
  dialog.scrollTop = 0;
}

async function passage(nodeId, signal) {
  const kept = await get(`v1/nodes/${encodeURIComponent(nodeId)}/kept`, signal);
  if (signal.aborted) return [];
  byId("reader-title").textContent = kept.title || kept.document_id;
  const all = kept.tokens.every((token) => token.kept);
  const last = kept.tokens.at(-1);
  if (last) last.text = last.text.trimEnd(); // else an empty line is shown behind it
  const text = make("p", { class: "passage", dir: "auto" }, ...pieces(kept.tokens, kept.state === "ready" && !all));
  const parts = [make("p", { class: "id", dir: "auto", text: kept.document_id }), facts(kept)];
  if (kept.state !== "ready") {
    parts.push(make("p", {
      class: "notice",
      text: kept.state === "failed" ? "Its concepts could not be made: it is read as text."
        : "Its concepts are still to be made: until then it is read as text.",
    }));
  } else if (all) {
    parts.push(make("p", { class: "notice", text: "Every token was kept: the savings come from the layers that are skipped." }));
  } else {
    const only = make("input", { type: "checkbox", on: { change: () => text.classList.toggle("only", only.checked) } });
    parts.push(
      make("div", { class: "legend" },
        make("p", {}, make("mark", { text: "Underlined" }), " tokens were kept, ", make("span", { class: "gone", text: "grey" }), " ones were not."),
        make("label", { class: "check" }, only, "Show only what was kept")),
    );
  }
  parts.push(text);
  return parts;
}

/** Runs of tokens of one kind, so that a screen reader is not stopped at every token. */
function pieces(tokens, marked) {
  if (!marked) return [tokens.map((token) => token.text).join("")];
  const runs = [];
  for (const { text, kept } of tokens) {
    if (runs.at(-1)?.kept === kept) runs.at(-1).text += text;
    else runs.push({ text, kept });
  }
  return runs.flatMap(({ text, kept }) => {
    if (!kept) return [make("span", { class: "gone", text })];
    const word = text.trimStart(); // a token has the space before its word; that is not worth a line
    return [text.slice(0, text.length - word.length), word ? make("mark", { text: word }) : null];
  });
}

function facts(kept) {
  const rows = [["Tokens", count(kept.n_tokens)], ["Concepts", count(kept.n_concepts)]];
  rows.push(["Rate", figure(kept.rate)]);
  rows.push(["Prefill cost", `${percent(kept.prefill_cost)} of text`]);
  rows.push(["Read from", kept.kind === "deep" ? `layer ${kept.entry_layer} on` : "the first layer on"]);
  return make("dl", { class: "facts" }, ...rows.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
}

async function wholeDocument(id, signal) {
  const found = await get(`v1/documents/${encodeURIComponent(id)}?text=true`, signal);
  const list = make("ol", { class: "chunks" });
  const more = make("button", { type: "button", text: "Show more" });
  let shown = 0;
  const add = () => {
    const next = found.nodes.slice(shown, shown + CHUNKS_AT_ONCE);
    const items = next.map((chunk, at) => chunkItem(chunk, shown + at + 1, () => openDocumentAgain(id, found.title)));
    list.append(...items);
    if (shown) items[0]?.querySelector("button").focus();
    shown += next.length;
    more.hidden = shown >= found.nodes.length;
  };
  more.addEventListener("click", add);
  add();
  return [
    make("p", { class: "id", dir: "auto", text: found.id }),
    make("p", { class: "hint", text: `${many(found.nodes.length, "chunk")}. Press one to see what was kept of it.` }),
    list,
    more,
  ];
}

function openDocumentAgain(id, title) {
  show(title || id, (signal) => wholeDocument(id, signal));
}

function chunkItem(chunk, number, back) {
  const made = chunk.state === "ready" ? many(chunk.n_concepts, "concept")
    : chunk.state === "failed" ? "concepts failed, read as text" : "waits for its concepts";
  const open = () => show(`Chunk ${number}`, async (signal) => [
    make("button", { type: "button", class: "quiet", text: "Back to the document", on: { click: back } }),
    ...(await passage(chunk.node_id, signal)),
  ]);
  return make("li", {},
    make("button", { type: "button", class: "passage-open", on: { click: open } },
      make("span", { class: "number", text: `Chunk ${number}` }),
      make("span", { class: "title", text: `${many(chunk.n_tokens, "token")}, ${made}` })),
    make("p", { class: "snippet", dir: "auto", text: chunk.text ?? "" }));
}
