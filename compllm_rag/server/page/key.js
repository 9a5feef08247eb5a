// The API key: asked for, kept for this tab, forgotten.
import { apiKey, useKey } from "./api.js";
import { byId, closeOnBackdrop, tell } from "./dom.js";
import { sentence } from "./words.js";

/**
 * Wire the dialog.
 * @param {() => void} onChange Called when there is another key, or none.
 */
export function setUpKey(onChange) {
  const dialog = byId("key");
  const field = byId("key-value");
  const trouble = byId("key-trouble");
  closeOnBackdrop(dialog);

  function open(why = "") {
    trouble.textContent = why;
    field.value = apiKey();
    byId("key-forget").hidden = !apiKey();
    if (!dialog.open) dialog.showModal();
    field.focus();
    field.select();
  }

  byId("key-open").addEventListener("click", () => open());
  byId("key-close").addEventListener("click", () => dialog.close());
  byId("key-forget").addEventListener("click", () => {
    useKey("");
    dialog.close();
    onChange();
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = field.value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      trouble.textContent = key ? "A key has letters, digits and signs only, without spaces." : "Enter a key first.";
      field.focus();
      return;
    }
    useKey(key);
    dialog.close();
    onChange();
  });
  document.addEventListener("key-needed", (event) => {
    tell(byId("trouble"), sentence(event.detail));
    if (!dialog.open) open(apiKey() ? sentence(event.detail) : "");
  });
}
