/** Log-probabilities: tokens with colours under them, and the most likely other tokens in a tooltip. */

import { byId, element } from "./dom.js";

/**
 * @typedef {{text: string, logprob: number}} Alternative
 * @typedef {{text: string, raw: string, logprob: number | null, top: Alternative[]}} Token
 *     `text` is what the token adds to the text, `raw` the token alone. The first token of a prompt has no logprob.
 */

/** Reads the tokens of a streamed chat. A character may have several tokens, and then belongs to the last one. */
export class ChatTokens {
  #decoder = new TextDecoder();

  /**
   * @param {any} logprobs OpenAI's object.
   * @returns {Token[]}
   */
  read(logprobs) {
    return (logprobs?.content ?? []).map((/** @type {any} */ each) => ({
      text: each.bytes ? this.#decoder.decode(new Uint8Array(each.bytes), { stream: true }) : each.token,
      raw: each.token,
      logprob: each.logprob,
      top: each.top_logprobs.map((/** @type {any} */ other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
}

/**
 * Reads the tokens of a completion.
 *
 * @param {any} logprobs OpenAI's lists.
 * @returns {Token[]}
 */
export function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((/** @type {string} */ text, /** @type {number} */ index) => ({
    text,
    raw: text,
    logprob: logprobs.token_logprobs[index],
    top: Object.entries(logprobs.top_logprobs[index] ?? {}).map(([other, logprob]) => ({ text: other, logprob })),
  }));
}

/** Shows tokens. Arrow keys go from token to token, so that the tab key passes all of them with one press. */
export class TokenView {
  constructor() {
    this.element = element("div", {
      class: "tokens",
      role: "group",
      "aria-label": "Tokens; arrow keys move between them",
      keydown: (event) => this.#move(/** @type {KeyboardEvent} */ (event)),
      pointerover: (event) => showTooltip(event.target),
      pointerdown: (event) => showTooltip(event.target),
      pointerleave: hideTooltip,
      focusin: (event) => showTooltip(event.target),
      focusout: hideTooltip,
    });
  }

  /** @param {Token[]} tokens All tokens so far; those shown already stay. */
  show(tokens) {
    const begin = this.element.childNodes.length;
    this.element.append(...tokens.slice(begin).map((token, index) => {
      const span = element("span", { class: "token", tabindex: begin + index ? -1 : 0 }, token.text || "·");
      if (!token.text) span.classList.add("part");
      if (token.logprob !== null) span.style.setProperty("--doubt", doubt(token.logprob).toFixed(1));
      told.set(span, token);
      return span;
    }));
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const here = document.activeElement;
    const steps = /** @type {Record<string, Element | null | undefined>} */ ({
      ArrowLeft: here?.previousElementSibling,
      ArrowRight: here?.nextElementSibling,
      Home: this.element.firstElementChild,
      End: this.element.lastElementChild,
    });
    const next = steps[event.key];
    if (!(next instanceof HTMLElement) || !(here instanceof HTMLElement)) return;
    event.preventDefault();
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

/** The scale of the colours. */
export function legend() {
  return element("span", { class: "legend" }, "sure", element("i"), "unsure");
}

/** @type {WeakMap<Element, Token>} */
const told = new WeakMap();
const UNSURE = Math.log(0.02); // and less has the colour at the end of the scale

/**
 * Returns how far along the scale of colours a token is, in percent.
 *
 * @param {number} logprob
 */
function doubt(logprob) {
  return 100 * Math.min(1, logprob / UNSURE);
}

/** @param {EventTarget | null} target */
function showTooltip(target) {
  const token = target instanceof Element && told.get(target);
  if (!token || !(target instanceof Element)) {
    hideTooltip();
    return;
  }
  const tooltip = byId("tooltip");
  const head = token.logprob === null ? "no probability: nothing precedes it" : percent(token.logprob);
  tooltip.replaceChildren(
    element("p", {}, element("code", {}, visible(token.raw)), ` ${head}`),
    ...(token.logprob === null ? [] : [element("p", { class: "hint" }, `logprob ${token.logprob.toFixed(4)}`)]),
    ...(token.top.length ? [alternatives(token)] : []),
  );
  tooltip.hidden = false;
  const at = target.getClientRects()[0];
  const { width, height } = tooltip.getBoundingClientRect();
  const below = at.bottom + 6;
  const top = below + height > innerHeight ? Math.max(4, at.top - 6 - height) : below;
  tooltip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  tooltip.style.top = `${top}px`;
  document.querySelector("[aria-describedby=tooltip]")?.removeAttribute("aria-describedby");
  target.setAttribute("aria-describedby", "tooltip");
}

export function hideTooltip() {
  byId("tooltip").hidden = true;
}

/** @param {Token} token */
function alternatives(token) {
  const sorted = token.top.toSorted((one, other) => other.logprob - one.logprob);
  return element("ol", {}, ...sorted.map(({ text, logprob }) => {
    const bar = element("i");
    bar.style.setProperty("--share", `${100 * Math.exp(logprob)}%`);
    const isOwn = text === token.raw;
    return element("li", { class: isOwn && "own" }, element("code", {}, visible(text)), bar, percent(logprob));
  }));
}

/** @param {number} logprob */
function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 0.01 ? `${share.toFixed(share < 10 ? 2 : 1)} %` : "< 0.01 %";
}

/** @param {string} text */
function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll(" ", "␣") || "(empty)";
}
