// Small helpers around the document. Text always goes in as text: nothing on this page is parsed as HTML.

/** The element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element.
 * @param {string} tag
 * @param {Object} [traits] `class`, `text`, `on` ({event: listener}), any other attribute; false and null leave it out.
 * @param {...(Node|string|null)} children
 */
export function make(tag, traits = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(traits)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

let waiting = [];
let timer = null;

/** Have a screen reader say something when it has time; what comes close together is said together. */
export function announce(text) {
  waiting.push(text);
  clearTimeout(timer);
  timer = setTimeout(() => {
    byId("announcer").textContent = waiting.join(" ");
    waiting = [];
  }, 200);
}

/** Show or clear a message; an empty one hides its place. */
export function tell(place, text) {
  place.textContent = text;
  place.hidden = !text;
}

/** Close a dialog on a click beside it, as Escape does. */
export function closeOnBackdrop(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}
