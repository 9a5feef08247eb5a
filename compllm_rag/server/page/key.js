// The API key and the namespace: asked for, kept for this tab, forgotten.
import { apiKey, namespace, useAccess } from "./api.js";
import { byId, closeOnBackdrop, tell } from "./dom.js";
import { sentence } from "./words.js";

/**
 * Wire the dialog.
 * @param {() => void} onChange Called when there is another key or namespace, or none.
 */
export function setUpKey(onChange) {
  const dialog = byId("key");
  const field = byId("key-value");
  const name = byId("key-namespace");
  const trouble = byId("key-trouble");
  closeOnBackdrop(dialog);

  function open(why = "") {
    trouble.textContent = why;
    field.value = apiKey();
    name.value = namespace();
    byId("key-forget").hidden = !apiKey() && !namespace();
    if (!dialog.open) dialog.showModal();
    field.focus();
    field.select();
  }

  function use(key, named) {
    useAccess(key, named);
    dialog.close();
    onChange();
  }

  byId("key-open").addEventListener("click", () => open());
  byId("key-close").addEventListener("click", () => dialog.close());
  byId("key-forget").addEventListener("click", () => use("", ""));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = field.value.trim();
    const named = name.value.trim();
    if (key && !/^[\x21-\x7e]+$/.test(key)) {
      trouble.textContent = "A key has letters, digits and signs only, without spaces.";
      field.focus();
      return;
    }
    if (!key && !named) {
      trouble.textContent = "Enter a key or a namespace first.";
      field.focus();
      return;
    }
    use(key, named);
  });
  document.addEventListener("key-needed", (event) => {
    tell(byId("trouble"), sentence(event.detail));
    if (!dialog.open) open(apiKey() ? sentence(event.detail) : "");
  });
}
