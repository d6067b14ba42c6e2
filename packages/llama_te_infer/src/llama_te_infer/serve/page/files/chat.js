/** The chat: a conversation, its messages on the page, and what one does with them. */

import { Answer, AnswerView, beforeDrawing, grow, wordsOf } from "./answers.js";
import { announce, byId, copyButton, element, fitHeight } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { requestFields, systemPrompt } from "./settings.js";

const STORE = "llama-te.conversation";

/** What someone has asked. */
class Question {
  /** @param {string} text */
  constructor(text) {
    this.text = text;
  }

  toMessage() {
    return { role: "user", content: this.text };
  }
}

/** The answers to a question, of which the chosen one belongs to the conversation. */
class Answers {
  /** @param {Answer[]} all */
  constructor(all) {
    this.all = all;
    this.chosen = 0;
  }

  toMessage() {
    return { role: "assistant", content: this.all[this.chosen].text };
  }
}

/** The chat of the page. */
export class Chat {
  /** @type {(Question | Answers)[]} */
  #turns = [];
  /** @type {Map<Question | Answers, HTMLElement>} */
  #elements = new Map();
  /** @type {WeakMap<Answer, AnswerView>} */
  #views = new WeakMap();
  /** @type {AbortController | null} */
  #running = null;
  #log = byId("messages");
  #box = byId("message", HTMLTextAreaElement);
  #model;

  /** @param {() => string} model Returns the name of the chosen model. */
  constructor(model) {
    this.#model = model;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#box.addEventListener("input", () => fitHeight(this.#box));
    this.#box.addEventListener("keydown", (event) => {
      // Enter also ends a word of an input method.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("stop-chat").addEventListener("click", () => this.stop());
    byId("clear-chat").addEventListener("click", () => this.#clear());
    byId("export-chat").addEventListener("click", () => this.#export());
    this.#restore();
    this.#show();
  }

  /** Ends what is being written; returns whether something was. */
  stop() {
    this.#running?.abort();
    return this.#running !== null;
  }

  // --- what one does -------------------------------------------------------------------------------------------------

  #send() {
    const text = this.#box.value;
    if (this.#running || !text.trim()) return;
    this.#box.value = "";
    fitHeight(this.#box);
    this.#turns.push(new Question(text), new Answers([new Answer()]));
    this.#answer(/** @type {Answers} */ (this.#turns.at(-1)));
  }

  /** @param {Answers} turn */
  #regenerate(turn) {
    if (this.#running) return;
    turn.chosen = turn.all.push(new Answer()) - 1;
    this.#answer(turn);
  }

  /**
   * @param {Question | Answers} turn
   * @param {string} text
   */
  #change(turn, text) {
    if (turn instanceof Question) {
      turn.text = text;
      this.#turns.length = this.#turns.indexOf(turn) + 1;
      const answers = new Answers([new Answer()]);
      this.#turns.push(answers);
      this.#answer(answers);
    } else {
      turn.all[turn.chosen] = new Answer(text);
      this.#show();
    }
  }

  #clear() {
    this.stop();
    this.#turns = [];
    this.#show();
    announce("The conversation is gone.");
    this.#box.focus();
  }

  #export() {
    const fields = settingsOrNothing();
    const content = {
      model: this.#model(),
      date: new Date().toISOString(),
      settings: fields,
      messages: this.#messages(),
      logprobs: this.#turns.map((turn) => (turn instanceof Answers ? turn.all[turn.chosen].tokens : [])),
    };
    const file = new Blob([JSON.stringify(content, null, 2)], { type: "application/json" });
    const address = URL.createObjectURL(file);
    element("a", { href: address, download: "conversation.json" }).click();
    URL.revokeObjectURL(address);
  }

  // --- requests ------------------------------------------------------------------------------------------------------

  /** @param {Question | Answers} [last] The last turn that the messages include. */
  #messages(last) {
    const turns = last ? this.#turns.slice(0, this.#turns.indexOf(last) + 1) : this.#turns;
    const system = systemPrompt();
    return [...(system ? [{ role: "system", content: system }] : []), ...turns.map((turn) => turn.toMessage())];
  }

  /**
   * Gets answers for a turn: the chosen one, and more behind it if the settings want several.
   *
   * @param {Answers} turn
   * @param {boolean} continues Whether the answer goes on behind its text.
   */
  async #answer(turn, continues = false) {
    const begin = turn.chosen;
    const answerOf = (/** @type {number} */ index) => (turn.all[begin + index] ??= growing(new Answer()));
    const running = (this.#running = new AbortController());
    const draw = beforeDrawing(() => this.#draw(turn));
    this.#box.focus();
    try {
      const fields = requestFields("chat");
      answerOf(0).begin("logprobs" in fields);
      const messages = this.#messages(turn);
      if (continues) Object.assign(fields, { n: 1, continue_final_message: true, add_generation_prompt: false });
      else messages.pop();
      this.#show();
      this.#scrollDown();
      announce("The model answers.");
      const body = { model: this.#model(), messages, ...fields };
      await grow("v1/chat/completions", body, running.signal, answerOf, draw);
    } catch (error) {
      answerOf(0).error = wordsOf(error);
    }
    this.#running = null;
    this.#atEnd(() => this.#show());
    const { error, finish } = answerOf(0);
    announce(error ? "" : finish === "stopped" ? "The answer is stopped." : "The answer is complete.");
  }

  // --- on the page ---------------------------------------------------------------------------------------------------

  /** Shows all turns. */
  #show() {
    const isRunning = this.#running !== null;
    byId("send").hidden = isRunning;
    byId("stop-chat").hidden = !isRunning;
    this.#log.classList.toggle("busy", isRunning);
    for (const turn of this.#elements.keys()) if (!this.#turns.includes(turn)) this.#elements.delete(turn);
    for (const turn of this.#turns) {
      const before = this.#elements.get(turn);
      const made = turn instanceof Question ? this.#questionElement(turn) : this.#answersElement(turn);
      this.#elements.set(turn, made);
      before?.replaceWith(made);
    }
    const isEmpty = this.#turns.length === 0;
    this.#log.replaceChildren(...(isEmpty ? [welcome()] : this.#elements.values()));
    for (const id of ["clear-chat", "export-chat"]) byId(id, HTMLButtonElement).disabled = isEmpty;
    this.#store();
  }

  /** @param {Answers} turn */
  #draw(turn) {
    this.#atEnd(() => this.#views.get(turn.all[turn.chosen])?.update());
  }

  /**
   * Shows more, and stays at the end if the end is in sight.
   *
   * @param {() => void} show
   */
  #atEnd(show) {
    const isAtEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 40;
    show();
    if (isAtEnd) this.#scrollDown();
  }

  #scrollDown() {
    this.#log.scrollTop = this.#log.scrollHeight;
  }

  /** @param {Question} turn */
  #questionElement(turn) {
    const text = element("div", { class: "text" }, turn.text);
    const made = element("article", { class: "question", "aria-label": "Your message" }, text);
    const edit = this.#editButton(turn, turn.text, text, "Send");
    made.append(element("div", { class: "actions" }, copyButton(() => turn.text), edit));
    return made;
  }

  /** @param {Answers} turn */
  #answersElement(turn) {
    const answer = turn.all[turn.chosen];
    const view = this.#views.get(answer) ?? new AnswerView(answer, showMarkdown);
    this.#views.set(answer, view);
    view.update();
    const isLast = turn === this.#turns.at(-1);
    const actions = element("div", { class: "actions" });
    if (turn.all.length > 1) actions.append(this.#chooser(turn));
    actions.append(copyButton(() => answer.text), this.#editButton(turn, answer.text, view.element, "Save"));
    if (isLast) {
      const again = () => this.#regenerate(turn);
      actions.append(element("button", { type: "button", class: "quiet", click: again }, "Regenerate"));
      const more = () => this.#running || this.#answer(turn, true);
      if (answer.text) actions.append(element("button", { type: "button", class: "quiet", click: more }, "Continue"));
    }
    actions.append(view.toggle, view.legend, view.note);
    return element("article", { class: "answers", "aria-label": "The model's answer" }, view.element, actions);
  }

  /** @param {Answers} turn */
  #chooser(turn) {
    const count = turn.all.length;
    const step = (/** @type {number} */ by, /** @type {string} */ label, /** @type {string} */ sign) => {
      const button = element("button", { type: "button", class: "quiet", "aria-label": label, click: () => {
        turn.chosen += by;
        this.#show();
      } }, sign);
      button.disabled = !(turn.chosen + by in turn.all);
      return button;
    };
    return element("span", { class: "chooser" }, step(-1, "The answer before", "‹"),
      `${turn.chosen + 1} of ${count}`, step(1, "The next answer", "›"));
  }

  /**
   * @param {Question | Answers} turn
   * @param {string} text
   * @param {HTMLElement} shown What the text area replaces.
   * @param {string} verb
   */
  #editButton(turn, text, shown, verb) {
    return element("button", { type: "button", class: "quiet", click: () => {
      if (this.#running) return;
      const area = element("textarea", { "aria-label": "Text of the message" });
      area.value = text;
      const accept = () => this.#change(turn, area.value);
      const cancel = () => this.#show();
      area.addEventListener("input", () => fitHeight(area));
      area.addEventListener("keydown", (event) => {
        if (event.key === "Escape") cancel();
        else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) accept();
      });
      shown.closest("article")?.replaceChildren(element("div", { class: "editor sheet" }, area,
        element("div", { class: "actions" },
          element("button", { type: "button", class: "quiet", click: cancel }, "Cancel"),
          element("button", { type: "button", class: "primary", click: accept }, verb))));
      fitHeight(area);
      area.focus();
    } }, "Edit");
  }

  // --- what this tab keeps -------------------------------------------------------------------------------------------

  #store() {
    try {
      sessionStorage.setItem(STORE, JSON.stringify(this.#turns.map((turn) => turn.toMessage())));
    } catch {
      sessionStorage.removeItem(STORE); // longer than a browser stores
    }
  }

  #restore() {
    for (const { role, content } of JSON.parse(sessionStorage.getItem(STORE) ?? "[]")) {
      this.#turns.push(role === "user" ? new Question(content) : new Answers([new Answer(content)]));
    }
  }
}

/** @param {Answer} answer */
function growing(answer) {
  answer.begin();
  return answer;
}

function settingsOrNothing() {
  try {
    return requestFields("chat");
  } catch {
    return {};
  }
}

function welcome() {
  return element("div", { class: "welcome" }, element("img", { src: "page/icon.svg", alt: "", width: 56, height: 56 }),
    element("p", {}, "Ask the model something."),
    element("p", { class: "hint" }, "Settings has the system prompt, sampling, beams and log-probabilities."));
}
