// Files and folders that are dropped onto the page.
import { byId } from "./dom.js";

/**
 * Take files that are dropped anywhere.
 * @param {(files: {file: File, name: string}[]) => void} onFiles
 * @param {() => boolean} allowed Whether documents may be changed.
 */
export function setUpDropping(onFiles, allowed) {
  const cover = byId("drop-cover");
  let depth = 0; // dragenter of a child comes before dragleave of its parent
  const over = (event) => event.dataTransfer?.types.includes("Files");

  addEventListener("dragenter", (event) => {
    if (!over(event)) return;
    depth += 1;
    cover.hidden = !allowed();
  });
  addEventListener("dragleave", (event) => {
    if (!over(event)) return;
    depth = Math.max(0, depth - 1);
    if (depth === 0) cover.hidden = true;
  });
  addEventListener("dragover", (event) => {
    if (!over(event)) return;
    event.preventDefault(); // else the browser opens the file in place of the page
    event.dataTransfer.dropEffect = allowed() ? "copy" : "none";
  });
  addEventListener("drop", async (event) => {
    if (!over(event)) return;
    event.preventDefault();
    depth = 0;
    cover.hidden = true;
    if (allowed()) onFiles(await filesOf(event.dataTransfer));
  });
}

/** All files of a drop, those of folders with their path as name. */
async function filesOf(transfer) {
  // Entries must be taken before the first await: afterwards the list is empty.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, name: file.name }));
  const found = [];
  for (const entry of entries) await collect(entry, found);
  return found;
}

async function collect(entry, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject)).catch(() => null);
    if (file) found.push({ file, name: entry.fullPath.replace(/^\//, "") });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // A hundred entries at a time, until there are none.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
    if (!some.length) return;
    for (const each of some) if (!each.name.startsWith(".")) await collect(each, found);
  }
}
