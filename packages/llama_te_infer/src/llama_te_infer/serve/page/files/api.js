/** The server's API. Addresses are relative, so the page also works behind a proxy that serves it below a path. */

const KEY = "llama-te.key";

/** An answer of the server that is an error, or no answer (status 0). */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * Keeps the API key for as long as this tab is open.
 *
 * @param {string} key
 */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/**
 * @param {string} path
 * @param {unknown} [body] A request with a body is a POST.
 * @param {AbortSignal} [signal]
 */
async function call(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  /** @type {Record<string, string>} */
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(path, { method, headers, body: JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The server does not answer. Check that it runs and that you are connected.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** @param {Response} response */
async function errorOf(response) {
  const text = await response.text();
  try {
    return new ApiError(response.status, JSON.parse(text).error.message);
  } catch {
    const said = response.statusText || "an error";
    return new ApiError(response.status, `The server answers with status ${response.status}: ${said}.`);
  }
}

/**
 * @param {string} path
 * @param {unknown} [body]
 * @param {AbortSignal} [signal]
 */
export async function getJson(path, body, signal) {
  return (await call(path, body, signal)).json();
}

/** @param {string} path */
export async function getText(path) {
  return (await call(path)).text();
}

/**
 * Yields the chunks of a streamed answer.
 *
 * @param {string} path
 * @param {object} body
 * @param {AbortSignal} signal Ends the request, here and on the server.
 * @returns {AsyncGenerator<any>}
 */
export async function* stream(path, body, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call(path, streamed, signal);
  for await (const data of events(/** @type {ReadableStream<any>} */ (response.body), signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(0, "The connection broke before the answer was complete.");
}

/**
 * Yields the data of server-sent events.
 *
 * @param {ReadableStream<any>} body
 * @param {AbortSignal} signal
 */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      return;
    }
    if (part.done) return;
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      // Lines that begin with a colon are comments, which keep the connection alive.
      const data = block.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield data.map((line) => line.slice("data: ".length)).join("\n");
    }
  }
}
