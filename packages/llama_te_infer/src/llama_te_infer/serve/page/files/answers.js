/** Answers: how they are requested, how they grow, and how they are shown. */

import { ApiError, hasKey, stream } from "./api.js";
import { element } from "./dom.js";
import { askForKey } from "./key.js";
import { ChatTokens, TokenView, completionTokens, legend } from "./tokens.js";

const FINISHES = /** @type {Record<string, string>} */ ({
  length: "limit reached",
  stopped: "stopped",
  tool_calls: "calls tools",
});

/** An answer to a conversation, or a continuation of a prompt. */
export class Answer {
  /** @param {string} [text] */
  constructor(text = "") {
    this.text = text;
    /** @type {import("./tokens.js").Token[]} */
    this.tokens = [];
    /** @type {{name: string, arguments: string}[]} */
    this.calls = [];
    this.finish = "";
    this.speed = "";
    this.error = "";
    this.isGrowing = false;
    this.reader = new ChatTokens();
  }

  /** @param {any} choice A chunk's choice. */
  add(choice) {
    this.text += choice.text ?? choice.delta?.content ?? "";
    this.tokens.push(...(choice.delta ? this.reader.read(choice.logprobs) : completionTokens(choice.logprobs)));
    for (const call of choice.delta?.tool_calls ?? []) {
      const known = (this.calls[call.index] ??= { name: "", arguments: "" });
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    this.finish = choice.finish_reason ?? this.finish;
  }

  /** Makes it ready to grow behind its text. */
  begin(hasLogprobs = false) {
    Object.assign(this, { isGrowing: true, finish: "", speed: "", error: "", reader: new ChatTokens() });
    if (!hasLogprobs) this.tokens = [];
    else if (this.text && !this.tokens.length) {
      this.tokens = [{ text: this.text, raw: this.text, logprob: null, top: [] }];
    }
  }
}

/**
 * Lets answers grow until all are complete, one fails, or the signal ends them.
 *
 * @param {string} path
 * @param {Record<string, unknown>} body
 * @param {AbortSignal} signal
 * @param {(index: number) => Answer} answerOf
 * @param {() => void} changed
 */
export async function grow(path, body, signal, answerOf, changed) {
  const begin = performance.now();
  const answers = new Set([answerOf(0)]);
  let first = 0;
  let usage = null;
  try {
    for await (const chunk of stream(path, body, signal)) {
      for (const choice of chunk.choices) {
        const answer = answerOf(choice.index);
        answers.add(answer);
        answer.add(choice);
        if (answer.text) first ||= performance.now();
      }
      usage = chunk.usage ?? usage;
      changed();
    }
  } catch (error) {
    for (const answer of answers) {
      if (answer.finish) continue;
      if (signal.aborted) answer.finish = "stopped";
      else answer.error = wordsOf(error);
    }
  }
  const end = performance.now();
  const speed = usage ? speedOf(usage.completion_tokens, (first || end) - begin, end - begin) : "";
  for (const answer of answers) Object.assign(answer, { isGrowing: false, speed });
  changed();
}

/**
 * Returns what a user is told of an error. Where a key is missing, the page asks for it.
 *
 * @param {unknown} error
 */
export function wordsOf(error) {
  if (error instanceof ApiError && error.status === 401) {
    askForKey(hasKey() ? "The server refuses this key." : "This server answers requests that have a key.");
  }
  return error instanceof Error ? error.message : String(error);
}

/**
 * @param {number} tokens
 * @param {number} wait Milliseconds to the first text.
 * @param {number} whole Milliseconds to the end.
 */
function speedOf(tokens, wait, whole) {
  const count = `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
  // The text of beam search arrives at its end.
  if (tokens < 2 || whole < 1.1 * wait) return `${count} in ${(whole / 1000).toFixed(2)} s`;
  const rate = (1000 * (tokens - 1)) / (whole - wait);
  return `${count} · ${rate.toFixed(1)} tokens/s · first after ${(wait / 1000).toFixed(2)} s`;
}

/** Shows an answer, as text or as tokens. */
export class AnswerView {
  /**
   * @param {Answer} answer
   * @param {(target: Element, text: string) => void} showText
   */
  constructor(answer, showText) {
    this.answer = answer;
    this.showText = showText;
    this.text = element("div", { class: "text" });
    this.tokens = new TokenView();
    this.shown = 0;
    this.asTokens = true;
    this.calls = element("div");
    this.error = element("div");
    this.element = element("div", { class: "answer" }, this.text, this.tokens.element, this.calls, this.error);
    this.note = element("span", { class: "note" });
    this.legend = legend();
    this.toggle = element("button", { type: "button", class: "quiet", click: () => {
      this.asTokens = !this.asTokens;
      this.update();
    } }, "Tokens");
    this.update();
  }

  update() {
    const { text, tokens, calls, error, finish, speed, isGrowing } = this.answer;
    const asTokens = this.asTokens && tokens.length > 0;
    if (tokens.length < this.shown) {
      this.element.replaceChild((this.tokens = new TokenView()).element, this.element.children[1]);
    }
    if (asTokens) this.tokens.show(tokens);
    else this.showText(this.text, text);
    this.shown = tokens.length;
    this.text.hidden = asTokens;
    this.tokens.element.hidden = !asTokens;
    this.legend.hidden = !asTokens;
    this.toggle.hidden = !tokens.length;
    this.toggle.setAttribute("aria-pressed", String(asTokens));
    this.calls.replaceChildren(...calls.map((call) => element("figure", { class: "code" },
      element("figcaption", {}, `Calls ${call.name}`), element("pre", {}, element("code", {}, call.arguments)))));
    this.error.replaceChildren(...(error ? [element("p", { class: "error", role: "alert" }, error)] : []));
    this.element.classList.toggle("growing", isGrowing);
    this.element.setAttribute("aria-busy", String(isGrowing));
    this.note.textContent = [FINISHES[finish], speed].filter(Boolean).join(" · ");
  }
}

/**
 * Returns a function that runs another one before the browser draws next, however often it is called.
 *
 * @param {() => void} action
 */
export function beforeDrawing(action) {
  let isAsked = false;
  return () => {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => {
      isAsked = false;
      action();
    });
  };
}
