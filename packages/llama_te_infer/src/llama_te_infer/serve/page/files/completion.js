/** Completions: the model continues a text as it is, without a chat template. */

import { Answer, AnswerView, beforeDrawing, grow, wordsOf } from "./answers.js";
import { getJson } from "./api.js";
import { announce, byId, copyButton, element } from "./dom.js";
import { requestFields } from "./settings.js";
import { completionTokens } from "./tokens.js";

const STORE = "llama-te.prompt";
const PATH = "v1/completions";

/** The form for prompts, and the continuations below it. */
export class Completion {
  /** @type {AbortController | null} */
  #running = null;
  #prompt = byId("prompt", HTMLTextAreaElement);
  #list = byId("continuations");
  #model;

  /** @param {() => string} model Returns the name of the chosen model. */
  constructor(model) {
    this.#model = model;
    this.#prompt.value = sessionStorage.getItem(STORE) ?? "";
    this.#prompt.addEventListener("input", () => sessionStorage.setItem(STORE, this.#prompt.value));
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#continue();
    });
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#continue();
    });
    byId("score").addEventListener("click", () => this.#score());
    byId("stop-completion").addEventListener("click", () => this.stop());
  }

  /** Ends what is being written; returns whether something was. */
  stop() {
    this.#running?.abort();
    return this.#running !== null;
  }

  #continue() {
    this.#run("The model continues the prompt.", async (fields, signal, answerOf, draw) => {
      answerOf(0).begin("logprobs" in fields);
      await grow(PATH, { model: this.#model(), prompt: this.#prompt.value, ...fields }, signal, answerOf, draw);
    });
  }

  /** Shows the log-probabilities of the prompt's tokens. */
  #score() {
    this.#run("The model reads the prompt.", async (fields, signal, answerOf) => {
      const logprobs = fields.logprobs ?? 5;
      const body = { model: this.#model(), prompt: this.#prompt.value, echo: true, max_tokens: 0, logprobs };
      const { choices, usage } = await getJson(PATH, body, signal);
      const tokens = completionTokens(choices[0].logprobs);
      const sum = tokens.reduce((total, { logprob }) => total + (logprob ?? 0), 0);
      const perplexity = Math.exp(-sum / (tokens.length - 1));
      answerOf(0).speed = `${usage.prompt_tokens} tokens · logprob ${sum.toFixed(3)}${
        tokens.length > 1 ? ` · perplexity ${perplexity.toFixed(2)}` : ""}`;
      Object.assign(answerOf(0), { tokens, text: choices[0].text });
    });
  }

  /**
   * @param {string} saying
   * @param {(fields: Record<string, unknown>, signal: AbortSignal, answerOf: (index: number) => Answer,
   *     draw: () => void) => Promise<void>} request
   */
  async #run(saying, request) {
    if (this.#running) return;
    if (!this.#prompt.value) {
      this.#prompt.focus();
      return;
    }
    const running = (this.#running = new AbortController());
    /** @type {AnswerView[]} */
    const views = [];
    const answerOf = (/** @type {number} */ index) => {
      while (views.length <= index) {
        const view = new AnswerView(new Answer(), (target, text) => (target.textContent = text));
        view.answer.isGrowing = true;
        views.push(view);
        this.#list.append(this.#card(view));
      }
      return views[index].answer;
    };
    this.#list.replaceChildren();
    this.#showRunning();
    announce(saying);
    try {
      await request(requestFields("completion"), running.signal, answerOf,
        beforeDrawing(() => views.forEach((view) => view.update())));
    } catch (error) {
      if (running.signal.aborted) answerOf(0).finish = "stopped";
      else answerOf(0).error = wordsOf(error);
    }
    this.#running = null;
    this.#showRunning();
    for (const view of views) {
      view.answer.isGrowing = false;
      view.update();
    }
    announce(answerOf(0).error ? "" : "The model has finished.");
  }

  /** @param {AnswerView} view */
  #card(view) {
    const keep = () => {
      if (this.#running) return;
      this.#prompt.value += view.answer.text;
      this.#prompt.dispatchEvent(new Event("input"));
      this.#list.replaceChildren();
      this.#prompt.focus();
    };
    return element("article", { class: "continuation sheet", "aria-label": "Continuation" }, view.element,
      element("div", { class: "actions" }, copyButton(() => view.answer.text),
        element("button", { type: "button", class: "quiet", click: keep }, "Add to the prompt"),
        view.toggle, view.legend, view.note));
  }

  #showRunning() {
    byId("continue").hidden = this.#running !== null;
    byId("score", HTMLButtonElement).disabled = this.#running !== null;
    byId("stop-completion").hidden = this.#running === null;
    this.#list.classList.toggle("busy", this.#running !== null);
  }
}
