// The numbers of the two answers, one under the other: each measure on one scale, in words as well as in length.
import { make } from "./dom.js";
import { bytes, count, percent, seconds } from "./words.js";

const MEASURES = [
  { key: "ttft_s", name: "Time to first token", about: "from passages in hand to the first token of the answer", show: seconds },
  { key: "positions", name: "Positions", about: "places of the prompt; a concept takes one, as a token does", show: count },
  { key: "prefill_cost", name: "Prefill cost", about: "work before the first token, as a share of the prompt as text", show: percent },
  { key: "kv_bytes", name: "KV cache", about: "memory of the prompt while the answer is written", show: bytes },
];
const LABELS = { text: "Text", concepts: "Concepts" };

/** Whose prompts were mostly in a cache of before, so that the times say nothing of reading them; null: nobody's. */
function cachedOf(text, concepts) {
  const [ours, theirs] = [text, concepts].map((values) => (values.reused_positions ?? 0) > 0.3 * values.positions);
  if (!ours && !theirs) return null;
  return ours && theirs ? "both prompts were" : `the prompt of ${ours ? "text" : "concepts"} was`;
}

/** Bars of one question. */
export class Bars {
  constructor(list) {
    this.values = { text: {}, concepts: {} };
    this.rows = MEASURES.map((measure) => row(measure));
    list.replaceChildren(...this.rows.map((each) => each.node));
  }

  /** Take what is known by now of one answer; numbers that are null are not known. */
  update(mode, values) {
    Object.assign(this.values[mode], values);
    for (const each of this.rows) each.draw(this.values.text, this.values.concepts);
  }

  /** The comparison in one sentence, for those who do not see the bars. */
  summary() {
    const { text, concepts } = this.values;
    return MEASURES.filter(({ key }) => text[key] != null && concepts[key] != null)
      .map(({ key, name, show }) => `${name}: text ${show(text[key])}, concepts ${show(concepts[key])}.`)
      .join(" ");
  }
}

function row({ key, name, about, show }) {
  const share = make("span", { class: "share" });
  const hint = make("p", { class: "hint", text: about });
  const lines = Object.fromEntries(
    Object.entries(LABELS).map(([mode, label]) => {
      const value = make("span", { class: "value", text: "–" });
      const bar = make("span", { class: `bar ${mode}` });
      const track = make("span", { class: "track", "aria-hidden": "true" }, bar);
      return [mode, { value, bar, node: make("div", {}, make("dt", { text: label }), make("dd", {}, track, value)) }];
    }),
  );
  const node = make(
    "li",
    { "data-measure": key },
    make("div", { class: "line" }, make("h3", { text: name }), share),
    hint,
    make("dl", {}, lines.text.node, lines.concepts.node),
  );

  function draw(text, concepts) {
    const longest = Math.max(text[key] ?? 0, concepts[key] ?? 0);
    for (const [mode, values] of [["text", text], ["concepts", concepts]]) {
      const known = values[key] != null;
      lines[mode].value.textContent = known ? show(values[key]) : "–";
      lines[mode].bar.style.inlineSize = known && longest > 0 ? `${(100 * values[key]) / longest}%` : "0";
    }
    const both = text[key] > 0 && concepts[key] != null;
    const cached = key === "ttft_s" && both ? cachedOf(text, concepts) : null;
    hint.textContent = cached ? `not to be compared: ${cached} cached from an earlier question` : about;
    share.textContent = both && !cached ? `concepts: ${percent(concepts[key] / text[key])} of text` : "";
  }

  return { node, draw };
}
