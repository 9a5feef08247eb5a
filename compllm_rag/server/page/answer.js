// One of the two answers while it is written, and after.
import { make } from "./dom.js";
import { count, figure, many, seconds, sentence } from "./words.js";

export const MODES = {
  text: { name: "Text", about: "The LLM reads the passages word for word." },
  concepts: { name: "Concepts", about: "The LLM reads what was made of the passages at ingestion." },
};

/** A card with one answer. */
export class AnswerCard {
  /**
   * @param {"text"|"concepts"} mode
   * @param {(nodeId: string, opener: Element) => void} onCitation
   * @param {() => void} onRetry
   */
  constructor(mode, onCitation, onRetry) {
    this.mode = mode;
    this.onCitation = onCitation;
    this.onRetry = onRetry;
    this.citations = new Map(); // number -> node id
    this.received = "";
    this.painting = 0;
    const heading = `answer-${mode}`;
    this.state = make("span", { class: "state", text: "Waiting for its turn" });
    this.written = document.createTextNode("");
    this.text = make("div", { class: "answer", dir: "auto" }, this.written);
    this.sources = make("p", { class: "sources", hidden: true });
    this.facts = make("p", { class: "hint facts" });
    this.trouble = make("p", { class: "notice bad", hidden: true });
    this.node = make(
      "article",
      { class: `card ${mode}`, "aria-labelledby": heading, "aria-busy": "true" },
      make("div", { class: "line" }, make("h3", { id: heading, text: MODES[mode].name }), this.state),
      make("p", { class: "hint", text: MODES[mode].about }),
      this.text, this.trouble, this.sources, this.facts,
    );
  }

  /** What happens now, in a word or three. */
  says(state) {
    this.state.textContent = state;
    this.node.dataset.state = state;
  }

  /** A piece of the answer. Pieces that come within one frame are painted together. */
  write(piece) {
    this.received += piece;
    if (!this.painting) this.painting = requestAnimationFrame(() => this.paint());
  }

  paint() {
    cancelAnimationFrame(this.painting);
    this.painting = 0;
    this.written.data = this.received;
  }

  /** The answer is complete. */
  done(answer) {
    this.received = answer.answer;
    this.end(answer.finish_reason === "length" ? "Cut off at its longest" : "Done");
    this.citations = new Map(answer.citations.map((citation) => [citation.number, citation]));
    if (answer.answer.trim()) this.text.replaceChildren(...this.withLinks(answer.answer));
    else this.text.replaceChildren(make("em", { text: "The answer is empty." }));
    if (answer.citations.length) {
      this.sources.replaceChildren("Read from ", ...answer.citations.map((citation) => this.link(citation)));
    } else {
      this.sources.textContent = "No passage was found to read from.";
    }
    this.sources.hidden = false;
    this.facts.textContent = facts(answer);
  }

  /** It was given up, by the one who asked. */
  cancelled() {
    this.end("Cancelled");
  }

  /** It went wrong. */
  failed(error) {
    this.end("Failed");
    this.trouble.hidden = false;
    this.trouble.replaceChildren(
      sentence(error), " ", make("button", { type: "button", text: "Ask again", on: { click: this.onRetry } }),
    );
  }

  end(state) {
    this.paint();
    this.says(state);
    this.node.removeAttribute("aria-busy");
    // An answer that is longer than its place can be scrolled with the keyboard, too.
    if (this.text.scrollHeight > this.text.clientHeight + 1) {
      this.text.tabIndex = 0;
      this.text.setAttribute("role", "region");
      this.text.setAttribute("aria-label", `Answer from ${this.mode}`);
    }
  }

  /** The answer with its marks [1], [2] as buttons, where they name a passage. */
  withLinks(answer) {
    return answer.split(/(\[\d{1,3}\])/).map((part) => {
      const number = /^\[(\d+)\]$/.exec(part)?.[1];
      const citation = number && this.citations.get(Number(number));
      return citation ? this.link(citation) : part;
    });
  }

  link(citation) {
    const title = citation.title || citation.document_id;
    return make("button", {
      type: "button",
      class: "cite",
      text: `[${citation.number}]`,
      title,
      "aria-label": `Passage ${citation.number}: ${title}`,
      on: { click: (event) => this.onCitation(citation.node_id, event.currentTarget) },
    });
  }
}

function facts(answer) {
  const { timings } = answer;
  const said = [`${many(answer.new_tokens, "token")} written in ${seconds(timings.decode_s)}`];
  if (timings.decode_s > 0 && answer.new_tokens > 1) {
    said[0] += ` (${figure((answer.new_tokens - 1) / timings.decode_s)} a second)`;
  }
  said.push(`search took ${seconds(timings.retrieval_s)}`);
  if (timings.queue_s >= 0.01) said.push(`waited ${seconds(timings.queue_s)} for its turn`);
  // Less than that is the opening that all prompts have.
  if (answer.reused_positions > 0.1 * answer.positions) {
    said.push(`${count(answer.reused_positions)} of ${count(answer.positions)} positions were cached from an earlier prompt`);
  }
  return `${said.join("; ")}.`;
}
