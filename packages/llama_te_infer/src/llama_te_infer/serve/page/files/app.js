/** The page: a chat or completions, the settings beside them, and the server's state above. */

import { wordsOf } from "./answers.js";
import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { byId, element } from "./dom.js";
import { followKey } from "./key.js";
import { followMetrics } from "./metrics.js";
import { showSettings } from "./settings.js";
import { hideTooltip } from "./tokens.js";

const models = byId("model", HTMLSelectElement);
const modes = { chat: new Chat(() => models.value), completion: new Completion(() => models.value) };
/** @type {keyof typeof modes} */
let mode = "chat";

async function showModels() {
  const chosen = models.value;
  try {
    const { data } = await getJson("v1/models");
    models.replaceChildren(...data.map((/** @type {any} */ { id, max_model_len: length }) =>
      element("option", { value: id }, `${id} · context ${length.toLocaleString("en")}`)));
    if (chosen) models.value = chosen;
    document.title = `${models.value} – llama-te`;
    models.title = "";
  } catch (error) {
    models.replaceChildren(element("option", { value: "" }, "no model"));
    models.title = wordsOf(error);
    byId("status").textContent = models.title;
  }
}

/** @param {keyof typeof modes} chosen */
function showMode(chosen) {
  mode = chosen;
  for (const name of Object.keys(modes)) {
    const tab = byId(`${name}-tab`);
    tab.setAttribute("aria-selected", String(name === mode));
    tab.tabIndex = name === mode ? 0 : -1;
    byId(name).hidden = name !== mode;
  }
}

/** @param {boolean} areShown */
function toggleSettings(areShown) {
  byId("settings").hidden = !areShown;
  byId("settings-button").setAttribute("aria-expanded", String(areShown));
}

const areBeside = matchMedia("(min-width: 60rem)");
toggleSettings(areBeside.matches);
areBeside.addEventListener("change", () => toggleSettings(areBeside.matches));
byId("settings-button").addEventListener("click", () => toggleSettings(byId("settings").hidden));
byId("settings-close").addEventListener("click", () => {
  toggleSettings(false);
  byId("settings-button").focus();
});
for (const name of /** @type {(keyof typeof modes)[]} */ (Object.keys(modes))) {
  byId(`${name}-tab`).addEventListener("click", () => showMode(name));
}
byId("modes").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  showMode(mode === "chat" ? "completion" : "chat");
  byId(`${mode}-tab`).focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog", HTMLDialogElement).open) return;
  hideTooltip();
  if (!modes[mode].stop() && !areBeside.matches) toggleSettings(false);
});
document.addEventListener("scroll", hideTooltip, { capture: true, passive: true });

showSettings();
followKey(() => {
  showModels();
  followMetrics();
});
showModels();
followMetrics();
