/**
 * Shows Markdown: paragraphs, headings, lists, quotes, tables, code, emphasis and links.
 *
 * A model's text is not trusted. It only ever becomes text nodes inside elements that this module makes; HTML in it
 * stays text, and images are not loaded. All of it takes linear time.
 */

import { copyButton, element } from "./dom.js";

const MAX_DEPTH = 12; // of lists, quotes and emphasis inside each other; what lies deeper is plain text

/** @type {WeakMap<Element, string[]>} */
const shown = new WeakMap();

/**
 * Makes an element show a text. Blocks that it shows already stay as they are, so a text can grow while someone
 * selects a part of it.
 *
 * @param {Element} target
 * @param {string} text
 */
export function showMarkdown(target, text) {
  const blocks = blocksOf(text.split("\n"));
  const before = shown.get(target) ?? [];
  let kept = 0;
  while (kept < before.length && before[kept] === blocks[kept]) kept++;
  while (target.childNodes.length > kept) target.lastChild?.remove();
  target.append(...blocks.slice(kept).map((block) => blockElement(block, 0)));
  shown.set(target, blocks);
}

// --- blocks ----------------------------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: +|$)/;
const TABLE_RULE = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;

/**
 * Splits lines into the sources of blocks.
 *
 * @param {string[]} lines
 */
function blocksOf(lines) {
  const blocks = [];
  for (let begin = 0; begin < lines.length; ) {
    if (!lines[begin].trim()) {
      begin++;
      continue;
    }
    const end = endOfBlock(lines, begin);
    blocks.push(lines.slice(begin, end).join("\n"));
    begin = end;
  }
  return blocks;
}

/**
 * @param {string[]} lines
 * @param {number} begin
 */
function endOfBlock(lines, begin) {
  const first = lines[begin];
  const fence = FENCE.exec(first);
  let end = begin + 1;
  if (fence) {
    while (end < lines.length && !closes(lines[end], fence[1])) end++;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(first) || RULE.test(first)) return end;
  if (QUOTE.test(first)) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
  } else if (ITEM.test(first)) {
    end = endOfList(lines, begin);
  } else if (isTable(lines, begin)) {
    while (end < lines.length && lines[end].includes("|")) end++;
  } else {
    while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  }
  return end;
}

/**
 * @param {string} line
 * @param {string} fence
 */
function closes(line, fence) {
  const found = line.trim();
  return found.length >= fence.length && found === fence[0].repeat(found.length);
}

/**
 * @param {string[]} lines
 * @param {number} begin
 */
function endOfList(lines, begin) {
  const isNumbered = /\d/.test(/** @type {RegExpExecArray} */ (ITEM.exec(lines[begin]))[2]);
  let end = begin + 1;
  let isBehindBlank = false;
  for (let at = end; at < lines.length; at++) {
    const line = lines[at];
    const item = ITEM.exec(line);
    if (!line.trim()) {
      isBehindBlank = true;
      continue;
    }
    const goesOn = item ? /\d/.test(item[2]) === isNumbered && !RULE.test(line) : /^ {2,}|^\t/.test(line);
    if (!goesOn && !(item && /^ /.test(line)) && (isBehindBlank || interrupts(lines, at))) break;
    isBehindBlank = false;
    end = at + 1;
  }
  return end;
}

/**
 * Whether a line begins a block although a paragraph precedes it.
 *
 * @param {string[]} lines
 * @param {number} at
 */
function interrupts(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(line)) || isTable(lines, at);
}

/**
 * @param {string[]} lines
 * @param {number} at
 */
function isTable(lines, at) {
  const rule = lines[at + 1] ?? "";
  return lines[at].includes("|") && rule.includes("|") && TABLE_RULE.test(rule);
}

/**
 * @param {string} source
 * @param {number} depth
 * @returns {HTMLElement}
 */
function blockElement(source, depth) {
  const lines = source.split("\n");
  const first = lines[0];
  const fence = FENCE.exec(first);
  if (depth > MAX_DEPTH) return element("p", {}, source);
  if (fence) return codeBlock(lines, fence);
  const heading = HEADING.exec(first);
  // The page has headings of its own above these.
  if (heading) return element(HEADINGS[heading[1].length - 1], {}, ...inline(heading[2]));
  if (RULE.test(first)) return element("hr");
  if (QUOTE.test(first)) {
    const inner = blocksOf(lines.map((line) => line.replace(QUOTE, "")));
    return element("blockquote", {}, ...inner.map((block) => blockElement(block, depth + 1)));
  }
  if (ITEM.test(first)) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return element("p", {}, ...inline(lines.map((line) => line.trimStart()).join("\n")));
}

const HEADINGS = /** @type {const} */ (["h3", "h4", "h5", "h6", "h6", "h6"]);

/**
 * @param {string[]} lines
 * @param {RegExpExecArray} fence
 */
function codeBlock(lines, fence) {
  const isClosed = lines.length > 1 && closes(lines[lines.length - 1], fence[1]);
  const code = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  return element(
    "figure",
    { class: "code" },
    element("figcaption", {}, element("span", {}, fence[2] || "text"), copyButton(() => code)),
    // People who use the keyboard can scroll a focused block.
    element("pre", { tabindex: 0 }, element("code", {}, code)),
  );
}

/**
 * @param {string[]} lines
 * @param {number} depth
 */
function list(lines, depth) {
  const first = /** @type {RegExpExecArray} */ (ITEM.exec(lines[0]));
  const indent = first[1].length;
  /** @type {string[][]} */
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && (!items.length || (item[1].length <= indent + 1 && item[1].length < width))) {
      width = item[0].length;
      items.push([line.slice(width)]);
    } else {
      const own = /^\s*/.exec(line.slice(0, width));
      items[items.length - 1].push(line.slice(own ? own[0].length : 0));
    }
  }
  const isNumbered = /\d/.test(first[2]);
  const start = isNumbered && Number.parseInt(first[2], 10);
  return element(isNumbered ? "ol" : "ul", { start: start !== 1 && start }, ...items.map((item) => {
    const [head, ...others] = blocksOf(item).map((block) => blockElement(block, depth + 1));
    if (!head) return element("li");
    return element("li", {}, ...(head.tagName === "P" ? head.childNodes : [head]), ...others);
  }));
}

/** @param {string[]} lines */
function table(lines) {
  const [head, rule, ...rows] = lines.map(cells);
  const row = (/** @type {string[]} */ texts, /** @type {"td" | "th"} */ tag) =>
    element("tr", {}, ...head.map((_, column) => {
      const align = /^:.*:$/.test(rule[column] ?? "") ? "center" : /:$/.test(rule[column] ?? "") ? "end" : "start";
      return element(tag, { class: align }, ...inline(texts[column] ?? ""));
    }));
  const body = element("tbody", {}, ...rows.map((texts) => row(texts, "td")));
  // People who use the keyboard can scroll a focused block.
  return element("div", { class: "table", tabindex: 0 },
    element("table", {}, element("thead", {}, row(head, "th")), body));
}

/** @param {string} line */
function cells(line) {
  const inner = line.trim().replace(/^\||\|$/g, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// --- text inside blocks ----------------------------------------------------------------------------------------------

const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const LINK = /\[([^[\]\n]*)\]\(([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)(?: +"[^"\n]*")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*]*[^\s<>"'`*.,:;!?)\]]/y;
const TAGS = /** @type {const} */ ({ "**": "strong", "__": "strong", "*": "em", "_": "em", "~~": "del" });

/**
 * Returns the nodes of a text with code, emphasis and links.
 *
 * @param {string} text
 * @returns {(Node | string)[]}
 */
function inline(text) {
  // Each frame is an emphasis that has begun; the first one is the whole text.
  /** @type {{marker: string, nodes: (Node | string)[]}[]} */
  const frames = [{ marker: "", nodes: [] }];
  const top = () => frames[frames.length - 1].nodes;
  /** @type {Set<number>} */
  const unclosed = new Set(); // lengths of runs of backticks that nothing closes
  let plain = "";
  const flush = () => {
    if (plain) top().push(plain);
    plain = "";
  };
  const put = (/** @type {Node} */ node) => {
    flush();
    top().push(node);
  };
  for (let at = 0; at < text.length; ) {
    const match = (/** @type {RegExp} */ pattern) => {
      pattern.lastIndex = at;
      return pattern.exec(text);
    };
    const character = text[at];
    let found;
    if (character === "\n") {
      put(element("br"));
      at++;
    } else if (character === "\\" && (found = match(ESCAPE))) {
      plain += found[1];
      at += 2;
    } else if (character === "`") {
      const run = lengthOfRun(text, at);
      const end = unclosed.has(run) ? -1 : endOfCode(text, at + run, run);
      if (end < 0) {
        unclosed.add(run);
        plain += text.slice(at, at + run);
        at += run;
      } else {
        put(element("code", {}, text.slice(at + run, end).replaceAll("\n", " ").replace(/^ (.*[^ ].*) $/, "$1")));
        at = end + run;
      }
    } else if (character === "[" && (found = match(LINK)) && isSafe(found[2])) {
      put(link(found[2], found[1]));
      at += found[0].length;
    } else if (character === "h" && !/\w/.test(text[at - 1] ?? "") && (found = match(ADDRESS))) {
      put(link(found[0], found[0]));
      at += found[0].length;
    } else if (character === "*" || character === "_" || (character === "~" && text[at + 1] === "~")) {
      const run = lengthOfRun(text, at);
      const before = text[at - 1] ?? " ";
      const after = text[at + run] ?? " ";
      const isInWord = character === "_" && /\w/.test(before) && /\w/.test(after);
      flush();
      let rest = run;
      if (!isInWord && /\S/.test(before)) rest = close(frames, character, rest);
      if (!isInWord && rest && /\S/.test(after)) rest = open(frames, character, rest);
      plain += character.repeat(rest);
      at += run;
    } else {
      plain += character;
      at++;
    }
  }
  flush();
  while (frames.length > 1) abandon(frames);
  return frames[0].nodes;
}

/**
 * @param {string} text
 * @param {number} at
 */
function lengthOfRun(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

/**
 * Returns where the backticks that end some code begin, or -1.
 *
 * @param {string} text
 * @param {number} from
 * @param {number} run
 */
function endOfCode(text, from, run) {
  for (let at = text.indexOf("`", from); at >= 0; ) {
    const found = lengthOfRun(text, at);
    if (found === run) return at;
    at = text.indexOf("`", at + found);
  }
  return -1;
}

/**
 * Ends what a run of markers ends; returns how many of them are left.
 *
 * @param {{marker: string, nodes: (Node | string)[]}[]} frames
 * @param {string} character
 * @param {number} run
 */
function close(frames, character, run) {
  for (;;) {
    const last = (/** @type {(length: number) => boolean} */ fits) =>
      frames.findLastIndex(({ marker }) => marker[0] === character && fits(marker.length));
    // "**" rather ends "**" than "*"; "***" ends what began last.
    let index = last((length) => run > 2 || length === run);
    if (index < 1) index = last((length) => length <= run);
    if (index < 1) return run;
    while (frames.length > index + 1) abandon(frames);
    const { marker, nodes } = /** @type {typeof frames[0]} */ (frames.pop());
    frames[index - 1].nodes.push(element(TAGS[/** @type {keyof typeof TAGS} */ (marker)], {}, ...nodes));
    run -= marker.length;
  }
}

/**
 * Begins what a run of markers begins; returns how many of them are left.
 *
 * @param {{marker: string, nodes: (Node | string)[]}[]} frames
 * @param {string} character
 * @param {number} run
 */
function open(frames, character, run) {
  while (run && frames.length <= MAX_DEPTH) {
    const marker = character.repeat(run % 2 ? 1 : 2);
    if (!(marker in TAGS)) break;
    frames.push({ marker, nodes: [] });
    run -= marker.length;
  }
  return run;
}

/**
 * Turns the last emphasis that has begun, but never ends, into text.
 *
 * @param {{marker: string, nodes: (Node | string)[]}[]} frames
 */
function abandon(frames) {
  const { marker, nodes } = /** @type {typeof frames[0]} */ (frames.pop());
  const outer = frames[frames.length - 1].nodes;
  outer.push(marker);
  for (const node of nodes) outer.push(node);
}

/** @param {string} address */
function isSafe(address) {
  return /^(?:https?:\/\/|mailto:)/i.test(address);
}

/**
 * @param {string} address
 * @param {string} text
 */
function link(address, text) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, text);
}
