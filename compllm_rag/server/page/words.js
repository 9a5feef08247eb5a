// Numbers and errors as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** 1234 -> "1,234" */
export function count(number) {
  return whole.format(number);
}

/** "1 chunk", "2 chunks" */
export function many(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** A short number: 2, 1.94 */
export function figure(number) {
  return short.format(number);
}

/** Seconds -> "312 ms", "1.24 s" */
export function seconds(value) {
  return value < 0.9995 ? `${short.format(value * 1000)} ms` : `${short.format(value)} s`;
}

/** Bytes -> "14.2 MiB" */
export function bytes(value) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${short.format(value)} ${units[unit]}`;
}

/** A share -> "52 %"; small ones keep a digit that tells something. */
export function percent(share) {
  return `${share > 0 && share < 0.1 ? short.format(share * 100) : whole.format(share * 100)} %`;
}

// What a program is told by a code, a person is told in a sentence. Codes that are missing here come with a message that
// says more than the page could: which file, which field.
const SENTENCES = {
  unreachable: "The server cannot be reached. Is it still running?",
  cut_off: "The connection ended before the answer did. Ask again.",
  not_json: "The server answered with something that is not its usual answer. Is this the right address?",
  missing_key: "This server needs an API key.",
  unknown_key: "This API key is not known here. Was it copied completely?",
  rate_limited: "Too many requests in a short time.",
  upload_queue_full: "Too many documents wait for their concepts already.",
  overloaded: "The server has as many questions as it can take.",
  shutting_down: "The server is shutting down.",
  storage_full: "The server's disk is full: nothing new can be taken in. Nothing was lost.",
  storage_locked: "Another program is writing to this storage.",
  prompt_too_long: "Question and passages are longer than this LLM can read. Ask with fewer passages, or shorter.",
  no_such_node: "This passage is not there any more: its document was changed or deleted.",
  no_such_document: "This document is not there any more.",
  too_large: "This is more than the server takes at once.",
  too_slow: "The upload came to a halt. Try again.",
  internal: "Something went wrong in the server. Its log says what.",
};
const PASSING = new Set(["rate_limited", "upload_queue_full", "overloaded", "shutting_down", "storage_locked"]);

/** An error of api.js as a sentence or two. */
export function sentence(error) {
  const said = SENTENCES[error.code] ?? upper(String(error.message || error));
  if (!PASSING.has(error.code)) return said;
  return `${said} Try again ${error.retryAfter ? `in ${many(error.retryAfter, "second")}` : "in a moment"}.`;
}

function upper(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
