// The passages that a question found, and how each of the two answers reads them.
import { byId, make, tell } from "./dom.js";
import { many, percent } from "./words.js";

/** Passages of one question. The two answers search on their own and find the same, so one list serves both. */
export class PassageList {
  /** @param {(nodeId: string, opener: Element) => void} onOpen */
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.items = new Map(); // node id -> {readings}
    this.list = byId("passage-list");
    this.list.replaceChildren();
    byId("passages").hidden = true;
    byId("passages-note").textContent = "Press one to see all of it, and what was kept of it.";
  }

  found(nodes) {
    byId("passages").hidden = false;
    if (!nodes.length) tell(byId("passages-note"), "No passage fits this question.");
    for (const node of nodes) {
      if (this.items.has(node.node_id)) continue;
      const readings = make("p", { class: "hint readings" });
      this.items.set(node.node_id, { readings, text: "", concepts: "" });
      this.list.append(this.item(node, readings));
    }
  }

  /** An answer is about to read them. */
  planned(mode, plan) {
    for (const node of plan.nodes) this.reads(node.node_id, mode, reading(mode, node));
    const policy = plan.reading?.outcome.read_policy;
    for (const nodeId of Object.keys(policy?.left_out ?? {})) {
      this.reads(nodeId, mode, mode === "text" ? "left out as text" : "left out as concepts");
    }
    for (const nodeId of plan.dropped) {
      this.reads(nodeId, mode, mode === "text" ? "as text it did not fit" : "as concepts it did not fit");
    }
  }

  reads(nodeId, mode, how) {
    const item = this.items.get(nodeId);
    if (!item) return;
    item[mode] = how;
    item.readings.textContent = [item.text, item.concepts].filter(Boolean).join("; ");
  }

  item(node, readings) {
    const title = node.title || node.document_id;
    return make(
      "li",
      {},
      make(
        "button",
        { type: "button", class: "passage-open", on: { click: (event) => this.onOpen(node.node_id, event.currentTarget) } },
        make("span", { class: "number", text: `[${node.number}]` }),
        make("span", { class: "title", dir: "auto", text: title }),
      ),
      make("p", { class: "snippet", dir: "auto", text: node.text }),
      readings,
    );
  }
}

function reading(mode, node) {
  if (mode === "text") return `as text ${many(node.positions, "position")}`;
  if (node.mode === "text" && node.parts) return `as text in both answers, ${many(node.positions, "position")}`;
  if (node.mode === "text") return "its concepts are not made yet, so both answers read text";
  return `as concepts ${many(node.positions, "position")}, ${percent(node.prefill_cost)} of the cost`;
}
