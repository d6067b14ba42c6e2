/** Asks for the API key. */

import { hasKey, setKey } from "./api.js";
import { byId } from "./dom.js";

/** @param {string} reason */
export function askForKey(reason) {
  const dialog = byId("key-dialog", HTMLDialogElement);
  byId("key-reason").textContent = reason;
  byId("key-forget").hidden = !hasKey();
  byId("key", HTMLInputElement).value = "";
  if (!dialog.open) dialog.showModal();
}

/** @param {() => void} changed Called when there is another key, or none. */
export function followKey(changed) {
  const dialog = byId("key-dialog", HTMLDialogElement);
  const use = (/** @type {string} */ key) => {
    setKey(key);
    dialog.close();
    changed();
  };
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    use(byId("key", HTMLInputElement).value.trim());
  });
  byId("key-forget").addEventListener("click", () => use(""));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-button").addEventListener("click", () => askForKey(
    hasKey() ? "Requests of this tab have a key." : "Requests of this tab have no key.",
  ));
}
