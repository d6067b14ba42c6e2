/** The settings: a form for the fields of requests, which this tab keeps. */

import { byId, element } from "./dom.js";

const STORE = "llama-te.settings";

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {string} label
 * @property {string} hint
 * @property {number} [min]
 * @property {number} [max]
 * @property {number} [step]
 * @property {number} [slider] Where its slider is without a value; without a number there is no slider.
 * @property {boolean} [draws] Whether beam search does without it.
 * @property {number} [rows] Of a field for text; numbers have none.
 * @property {string} [example]
 */

/** @type {{title: string, fields: Field[]}[]} */
const GROUPS = [
  {
    title: "Conversation",
    fields: [{ name: "system", label: "System prompt", hint: "", rows: 3, example: "You are a helpful assistant." }],
  },
  {
    title: "Sampling",
    fields: [
      { name: "temperature", label: "Temperature", hint: "0 takes the likeliest token", min: 0, max: 2, step: 0.05,
        slider: 1, draws: true },
      { name: "top_p", label: "Top p", hint: "1 for all tokens", min: 0.01, max: 1, step: 0.01, slider: 1,
        draws: true },
      { name: "min_p", label: "Min p", hint: "0 for all tokens", min: 0, max: 1, step: 0.01, slider: 0,
        draws: true },
      { name: "top_k", label: "Top k", hint: "0 for all tokens", min: 0, step: 1, draws: true },
      { name: "seed", label: "Seed", hint: "equal seeds, equal texts", step: 1, draws: true, example: "random" },
    ],
  },
  {
    title: "Length",
    fields: [
      { name: "max_tokens", label: "Most tokens", hint: "empty: as many as fit", min: 1, step: 1, example: "no limit" },
      { name: "stop", label: "Stop strings", hint: "one a line; \\n is a new line", rows: 2 },
    ],
  },
  {
    title: "Answers",
    fields: [
      { name: "n", label: "Answers", hint: "to choose from", min: 1, step: 1, example: "1" },
      { name: "beams", label: "Beams", hint: "2 or more: beam search", min: 1, step: 1, example: "1" },
      { name: "logprobs", label: "Logprobs", hint: "alternatives for each token", min: 0, max: 20, step: 1,
        example: "off" },
    ],
  },
  {
    title: "More",
    fields: [{ name: "more", label: "Further fields", hint: "of the request, as JSON", rows: 3,
      example: '{"repetition_penalty": 1.1}' }],
  },
];
const FIELDS = GROUPS.flatMap((group) => group.fields);

/** @type {Record<string, string>} */
let values = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");

/** A setting that cannot be sent. */
export class SettingsError extends Error {}

export function systemPrompt() {
  return (values.system ?? "").trim();
}

/**
 * Returns the fields of a request that the settings make. Empty ones are left to the server's defaults.
 *
 * @param {"chat" | "completion"} kind
 * @returns {Record<string, unknown>}
 */
export function requestFields(kind) {
  /** @type {Record<string, unknown>} */
  const fields = {};
  const isSearch = Number(values.beams) > 1;
  for (const { name, label, min, max, step, rows, draws } of FIELDS) {
    const text = values[name] ?? "";
    if (rows || !text || (draws && isSearch)) continue;
    const value = Number(text);
    const isWhole = step !== 1 || Number.isSafeInteger(value);
    if (!isWhole || Number.isNaN(value) || value < (min ?? -Infinity) || value > (max ?? Infinity)) {
      const range = max === undefined ? (min === undefined ? "" : ` of at least ${min}`) : ` from ${min} to ${max}`;
      throw new SettingsError(`${label} is ${text}: give ${step === 1 ? "an integer" : "a number"}${range}.`);
    }
    fields[name] = value;
  }
  const stop = (values.stop ?? "").split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) fields.stop = stop;
  if (isSearch) Object.assign(fields, { use_beam_search: true, best_of: fields.beams });
  delete fields.beams;
  if (kind === "chat" && "logprobs" in fields) Object.assign(fields, { logprobs: true, top_logprobs: fields.logprobs });
  // A completion without the field has 16 tokens.
  if (kind === "completion" && !("max_tokens" in fields)) fields.max_tokens = null;
  return { ...fields, ...furtherFields() };
}

/** @returns {Record<string, unknown>} */
function furtherFields() {
  if (!values.more?.trim()) return {};
  try {
    const fields = JSON.parse(values.more);
    if (typeof fields === "object" && fields !== null && !Array.isArray(fields)) return fields;
  } catch {
    // The message below says it.
  }
  throw new SettingsError('Further fields are no JSON object: write them as {"name": value}.');
}

export function showSettings() {
  const reset = element("button", { type: "button", class: "quiet", click: () => {
    values = {};
    store();
    showSettings();
  } }, "Reset");
  byId("settings-form").replaceChildren(
    element("p", { class: "hint" }, "Empty fields have the defaults of the model."),
    ...GROUPS.map(({ title, fields }) =>
      element("fieldset", {}, element("legend", {}, title), ...fields.map(control))),
    reset,
  );
  showUnused();
}

/** @param {Field} field */
function control(field) {
  const { name, label, hint, min, max, step, rows, example } = field;
  const id = `setting-${name}`;
  const set = (/** @type {string} */ text) => {
    values[name] = text;
    store();
    showUnused();
  };
  const about = { id, name, "aria-describedby": hint ? `${id}-hint` : false, placeholder: example ?? (rows ? "" : "default") };
  const caption = element("label", { for: id }, label, " ");
  const small = element("small", { id: `${id}-hint` }, hint);
  if (rows) {
    const area = element("textarea", { ...about, rows, spellcheck: name === "system", input: () => set(area.value) });
    area.value = values[name] ?? "";
    return element("div", { class: "field text" }, caption, small, area);
  }
  const bounds = { min: min ?? false, max: max ?? false, step: step ?? "any" };
  const box = element("input", { ...about, ...bounds, type: "number", inputmode: "decimal" });
  box.value = values[name] ?? "";
  // The box has the same value, and people who use the keyboard or a screen reader have the box.
  const slider = element("input", { ...bounds, type: "range", tabindex: -1, "aria-hidden": "true" });
  const showSlider = () => {
    slider.value = box.value || String(field.slider);
    slider.classList.toggle("unset", !box.value);
  };
  box.addEventListener("input", () => {
    set(box.value);
    showSlider();
  });
  slider.addEventListener("input", () => {
    set((box.value = slider.value));
    showSlider();
  });
  showSlider();
  return element("div", { class: "field" }, caption, box, small, ...(field.slider === undefined ? [] : [slider]));
}

/** Shows which fields beam search does without. */
function showUnused() {
  for (const { name, draws } of FIELDS) {
    const field = byId(`setting-${name}`).parentElement;
    const isUnused = Boolean(draws) && Number(values.beams) > 1;
    field?.classList.toggle("unused", isUnused);
    for (const input of field?.querySelectorAll("input") ?? []) input.disabled = isUnused;
  }
}

function store() {
  sessionStorage.setItem(STORE, JSON.stringify(values));
}
