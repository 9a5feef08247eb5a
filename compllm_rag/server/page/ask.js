// A question, and its two answers.
import { ask } from "./api.js";
import { AnswerCard, MODES } from "./answer.js";
import { Bars } from "./bars.js";
import { announce, byId } from "./dom.js";
import { PassageList } from "./passages.js";
import { openPassage } from "./reader.js";
import { sentence } from "./words.js";

let running = null; // AbortController of the question that is being answered
let asked = 0;

/** Wire the form. */
export function setUpAsking() {
  const form = byId("ask-form");
  const question = byId("question");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (question.value.trim()) answerBoth(requestOf(form));
    else question.focus();
  });
  question.addEventListener("keydown", (event) => {
    // Enter that ends an input method's composition chooses a word, and asks nothing.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  byId("cancel").addEventListener("click", () => {
    running?.abort();
    announce("Cancelled.");
    question.focus(); // the button that had the focus goes away
  });
}

/** Take away what was asked and answered. */
export function forgetAnswers() {
  running?.abort();
  running = null;
  for (const id of ["answers", "costs", "passages", "cancel"]) byId(id).hidden = true;
  for (const id of ["cards", "measures", "passage-list", "asked"]) byId(id).replaceChildren();
  byId("question").value = "";
  byId("welcome").hidden = false;
}

function requestOf(form) {
  const fields = new FormData(form);
  return {
    query: fields.get("question").trim(),
    top_k: Number(fields.get("top-k")),
    retrieval: fields.get("retrieval"),
    max_tokens: Number(fields.get("max-tokens")),
  };
}

async function answerBoth(request) {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  const again = () => answerBoth(request);
  const open = (nodeId, opener) => openPassage(nodeId, opener);
  const cards = Object.fromEntries(Object.keys(MODES).map((mode) => [mode, new AnswerCard(mode, open, again)]));
  const bars = new Bars(byId("measures"));
  const passages = new PassageList(open);
  byId("welcome").hidden = true;
  byId("answers").hidden = false;
  byId("costs").hidden = true; // until there is something to compare
  byId("asked").textContent = request.query;
  byId("cards").replaceChildren(...Object.values(cards).map((card) => card.node));
  byId("cancel").hidden = false;
  announce("Asked. Both answers are being made.");
  // Whoever goes second may find warmer caches: the two take turns.
  const order = asked++ % 2 ? ["concepts", "text"] : ["text", "concepts"];
  await Promise.all(order.map((mode) => answerOne(mode, request, cards[mode], bars, passages, controller.signal)));
  if (running !== controller) return; // another question has taken over
  running = null;
  byId("cancel").hidden = true;
  if (!controller.signal.aborted) announce(bars.summary());
}

async function answerOne(mode, request, card, bars, passages, signal) {
  const name = MODES[mode].name;
  try {
    for await (const { event, data } of ask("v1/query", { ...request, mode }, signal)) {
      if (event === "retrieved") {
        card.says("Reading");
        passages.found(data.nodes);
      } else if (event === "plan") {
        byId("costs").hidden = false;
        bars.update(mode, data);
        passages.planned(mode, data);
      } else if (event === "token") {
        card.says("Writing");
        card.write(data.text);
      } else if (event === "done") {
        card.done(data);
        if (data.prefill_cost !== null) bars.update(mode, data); // null: nothing was found, and nothing read
        announce(`${name}: ${data.answer}`);
      }
    }
  } catch (error) {
    if (signal.aborted) {
      card.cancelled();
    } else {
      card.failed(error);
      announce(`${name}: ${sentence(error)}`);
    }
  }
}
