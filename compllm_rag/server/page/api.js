// Requests to the server this page came from, and to no other.
import { events } from "./sse.js";

const KEY = "compllm-rag-key";
const NAMESPACE = "compllm-rag-namespace";

/** What went wrong; `code` is the server's, or one of words.js. */
export class ApiError extends Error {
  constructor(code, message, status = 0, retryAfter = 0) {
    super(message);
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const withoutStorage = {}; // some browsers refuse sessionStorage; what is kept then lives as long as the page

function kept(name) {
  try {
    return sessionStorage.getItem(name) ?? withoutStorage[name] ?? "";
  } catch {
    return withoutStorage[name] ?? "";
  }
}

function keep(name, value) {
  withoutStorage[name] = value;
  try {
    if (value) sessionStorage.setItem(name, value);
    else sessionStorage.removeItem(name);
  } catch {
    // it is kept above
  }
}

/** The API key of this tab, or an empty text. */
export function apiKey() {
  return kept(KEY);
}

/** The namespace that this tab named, or an empty text: then it is the key's, or the storage's own. */
export function namespace() {
  return kept(NAMESPACE);
}

/** Keep a key and a namespace for this tab; empty ones are forgotten. */
export function useAccess(key, name) {
  keep(KEY, key);
  keep(NAMESPACE, name);
}

/** UTF-8 as a header can carry it: a character for each byte. */
function bytesOf(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

function headers(more = {}) {
  const all = { ...more };
  if (apiKey()) all.Authorization = `Bearer ${apiKey()}`;
  if (namespace()) all["X-Namespace"] = bytesOf(namespace());
  return all;
}

/** An error response as an error; bodies that are not the server's are not shown. */
function failure(status, text, retryAfter) {
  let told = null;
  try {
    told = JSON.parse(text).error;
  } catch {
    // a proxy's page, say
  }
  const wait = Number.parseInt(retryAfter ?? "", 10) || 0;
  if (!told?.code) return new ApiError("not_json", `status ${status}`, status, wait);
  const error = new ApiError(told.code, told.message, status, wait);
  if (status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: error }));
  return error;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", String(error));
  }
  if (!response.ok) throw failure(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

async function json(path, options) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("not_json", String(error), response.status);
  }
}

/** GET a JSON object. */
export function get(path, signal) {
  return json(path, { headers: headers(), signal });
}

/** DELETE something. */
export function remove(path) {
  return json(path, { method: "DELETE", headers: headers() });
}

/**
 * POST a question and read the events of its answer.
 * @param {string} path
 * @param {Object} body
 * @param {AbortSignal} signal Aborting it ends the generation.
 * @returns {AsyncGenerator<{event: string, data: Object}>} Ends after `done`; an event `error` is thrown.
 */
export async function* ask(path, body, signal) {
  const response = await send(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  try {
    for await (const { event, data } of events(response.body)) {
      const told = JSON.parse(data);
      if (event === "error") throw new ApiError(told.error.code, told.error.message, response.status);
      yield { event, data: told };
      if (event === "done") return;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("cut_off", String(error));
  }
  throw new ApiError("cut_off", "the stream ended without its last event");
}

/**
 * POST a file. By XMLHttpRequest, because fetch does not tell how much has been sent.
 * @param {File} file
 * @param {string} name It goes in as.
 * @param {(share: number) => void} onProgress
 * @param {AbortSignal} signal
 */
export function upload(file, name, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "v1/documents");
    for (const [field, value] of Object.entries(headers())) request.setRequestHeader(field, value);
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    request.addEventListener("load", () => {
      const { status, responseText } = request;
      if (status < 200 || status > 299) {
        reject(failure(status, responseText, request.getResponseHeader("Retry-After")));
        return;
      }
      try {
        resolve(JSON.parse(responseText));
      } catch (error) {
        reject(new ApiError("not_json", String(error), status));
      }
    });
    request.addEventListener("error", () => reject(new ApiError("unreachable", "the upload failed")));
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    const form = new FormData();
    form.append("files", file, name);
    request.send(form);
  });
}
