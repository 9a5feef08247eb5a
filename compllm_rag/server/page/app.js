// The page of the server: documents in, questions answered twice, passages looked at. docs/guide/page.md describes it.
import { get } from "./api.js";
import { forgetAnswers, setUpAsking } from "./ask.js";
import { allowChanges, forgetDocuments, load, setUpDocuments, watchQueue } from "./documents.js";
import { byId, tell } from "./dom.js";
import { setUpDropping } from "./dropping.js";
import { setUpKey } from "./key.js";
import { setUpReader } from "./reader.js";
import { add, forgetUploads, limitUploads, setUpUploads } from "./uploads.js";
import { bytes, figure, sentence } from "./words.js";

const KNOWN = [".md", ".txt", ".html", ".pdf", ".docx", ".csv", ".json", ".py"]; // named first; all are in the list below

let mayWrite = false;
let described = false;

/** Ask the server what it is, and show that. */
async function start() {
  described = false;
  try {
    describe(await get("v1/info"));
    tell(byId("trouble"), "");
  } catch (error) {
    if (error.code === "no_such_namespace") {
      allow(true); // the first upload makes it
      tell(byId("trouble"), "");
    } else {
      allow(false);
      byId("read-only").hidden = true;
      byId("about").textContent = "";
      tell(byId("trouble"), sentence(error));
      return;
    }
  }
  await documentsChanged();
  watchQueue();
}

async function documentsChanged() {
  const total = await load();
  const next = byId("welcome-next");
  if (total === 0) next.textContent = "There are no documents yet: add some first.";
  else if (total !== null) next.textContent = "Ask something that the documents on this page answer.";
}

function describe(info) {
  const kind = info.kind === "deep" ? `deep concepts from layer ${info.entry_layer} of ${info.depth} on` : "concepts at the input embeddings";
  const parts = [info.llm, `${kind}, rate ${figure(info.rate)}`];
  if (info.namespace !== "default") parts.push(`namespace ${info.namespace}`);
  byId("about").textContent = parts.join(" · ");
  described = true;
  allow(info.may_write);
  limitUploads(info.limits.upload_bytes);
  byId("files").accept = info.file_types.join(",");
  const known = KNOWN.filter((ending) => info.file_types.includes(ending));
  byId("drop-hint").textContent = `Files like ${known.join(", ")}, up to ${bytes(info.limits.upload_bytes)} each.`;
  byId("kinds").hidden = false;
  byId("kinds-list").textContent = info.file_types.join(" ");
  for (const option of byId("max-tokens").options) option.disabled = Number(option.value) > info.limits.max_tokens;
}

function allow(allowed) {
  mayWrite = allowed;
  allowChanges(allowed);
  byId("drop").hidden = !allowed;
  if (!allowed) byId("kinds").hidden = true;
  byId("read-only").hidden = allowed;
}

setUpAsking();
setUpDocuments();
setUpReader();
setUpUploads(() => {
  if (!described) {
    start(); // a namespace can tell nothing of itself before its first document
    return;
  }
  documentsChanged();
  watchQueue();
});
setUpDropping(add, () => mayWrite);
setUpKey(() => {
  // What one key may see is not for whoever comes with another one, or with none.
  forgetUploads();
  forgetAnswers();
  forgetDocuments();
  byId("welcome-next").textContent = "";
  start();
});
start();
