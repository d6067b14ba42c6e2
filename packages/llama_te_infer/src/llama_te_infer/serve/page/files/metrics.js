/** The server's load, from its Prometheus metrics. */

import { ApiError, getText } from "./api.js";
import { byId, element } from "./dom.js";

const SECONDS = 2;
const SECONDS_WITHOUT = 30; // where the server has no metrics, or does not answer

/** @type {{time: number, tokens: number} | null} */
let before = null;
let timer = 0;

/** Shows the metrics, now and from time to time, while someone can see them. */
export async function followMetrics() {
  clearTimeout(timer);
  let seconds = SECONDS;
  try {
    if (!document.hidden) show(samplesOf(await getText("metrics")));
  } catch (error) {
    seconds = SECONDS_WITHOUT;
    before = null;
    const status = error instanceof ApiError ? error.status : 0;
    if (status === 0) showText("no connection");
    else if (status === 401) showText("metrics need a key");
    else showText("no metrics");
  }
  clearTimeout(timer);
  timer = setTimeout(followMetrics, 1000 * seconds);
}

/**
 * Returns the sum of each metric over its labels.
 *
 * @param {string} text Prometheus' text format.
 */
function samplesOf(text) {
  /** @type {Map<string, number>} */
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^([\w:]+)(?:\{.*\})? (\S+)/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return sums;
}

/** @param {Map<string, number>} samples */
function show(samples) {
  const running = samples.get("vllm:num_requests_running");
  const tokens = samples.get("vllm:generation_tokens_total");
  if (running === undefined || tokens === undefined) {
    showText("no metrics");
    return;
  }
  const now = { time: performance.now(), tokens };
  const rate = before && (1000 * Math.max(0, tokens - before.tokens)) / (now.time - before.time);
  before = now;
  byId("metrics").replaceChildren(
    ...pair("running", String(running)),
    ...pair("waiting", String(samples.get("vllm:num_requests_waiting") ?? 0)),
    ...pair("tokens/s", rate === null ? "–" : Math.round(rate).toLocaleString("en")),
    ...pair("cache", `${(100 * (samples.get("vllm:kv_cache_usage_perc") ?? 0)).toFixed(0)} %`),
  );
}

/**
 * @param {string} name
 * @param {string} value
 */
function pair(name, value) {
  return [element("div", {}, element("dt", {}, name), element("dd", {}, value))];
}

/** @param {string} text */
function showText(text) {
  byId("metrics").replaceChildren(element("div", {}, element("dt", { class: "hidden-text" }, "Metrics"),
    element("dd", { class: "hint" }, text)));
}
