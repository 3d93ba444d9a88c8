/* The page of `blockdiff serve`: a form, and one or two runs whose text appears token by token.
   What the model wrote enters the page as text only (textContent), never as markup. */

const SHADES = 12; // steps that page.css has a colour for
const DEFAULT = ""; // the choice that leaves the policy to the server
const OTHER = "…"; // the choice that opens a field for one's own value

const byId = (id) => document.getElementById(id);

function make(name, properties = {}, parent = null) {
  const element = Object.assign(document.createElement(name), properties);
  if (parent) parent.append(element);
  return element;
}

/* ---- The server ---- */

/** What the server, or the way to it, says against a request; `param` is the field it names. */
class Failure extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The events {name, data} of a stream of bytes (server-sent events; EventSource cannot POST). */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let name = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(lost);
      if (done) return; // an event without its empty line was cut off, and is none
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop(); // may end with a CR whose LF is still to come
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { name: name || "message", data: data.join("\n") };
          [name, data] = ["", []];
          continue;
        }
        const [, field, content] = line.match(/^([^:]*)(?:: ?)?([^]*)$/);
        if (field === "data") data.push(content);
        else if (field === "event") name = content;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new Failure("The server does not answer, or the connection was lost; is it still running?");
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("api-key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch(lost);
  if (response.ok) return response;
  const { error = {} } = await response.json().catch(() => ({}));
  const message = error.message ?? `The server answered ${response.status} ${response.statusText}`;
  const wait = response.headers.get("Retry-After");
  const when = wait && !/try again/.test(message) ? `; try again in ${wait} s` : "";
  throw new Failure(message + when, { status: response.status, param: error.param });
}

/** Runs one request and shows it; returns its run. A stream must end with [DONE], or the connection was lost. */
async function decode({ path, body }, run, signal) {
  try {
    const response = await ask(path, { method: "POST", body: JSON.stringify(body), signal });
    for await (const { name, data } of events(response.body)) {
      if (data === "[DONE]") return run;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(chunk.error.message, { param: chunk.error.param });
      if (name === "draft") run.draft(chunk);
      else if (name === "message") run.take(chunk);
    }
    throw new Failure("The connection was lost before the end of the text.");
  } finally {
    run.close();
  }
}

/* ---- A run: its numbers and its text ---- */

class Run {
  constructor({ body }, title) {
    this.blockSize = body.diffusion.block_size;
    this.limit = body.max_tokens;
    this.count = 0; // final tokens
    this.forwards = 0;
    this.blocks = []; // places where blocks begin
    this.open = { start: 0, tokens: [] };
    this.text = "";
    this.usage = null;
    this.began = performance.now();
    this.seconds = 0;
    this.article = byId("run").content.firstElementChild.cloneNode(true);
    this.article.querySelector("h2").textContent = title;
    this.stage = this.article.querySelector(".text");
    make("span", { className: "prompt", textContent: body.prompt ?? "" }, this.stage);
    this.place = make("span", { className: "open", ariaHidden: "true" }, this.stage);
    this.tip = this.article.querySelector(".tip");
    this.listen();
    byId("runs").append(this.article);
    this.showOpen();
  }

  /** A chunk: final tokens with their steps, or the usage at the end. */
  take({ choices, diffusion, usage }) {
    if (usage) this.usage = usage;
    if (!diffusion) return;
    const { start, tokens, forwards } = diffusion;
    const text = choices[0].text ?? choices[0].delta.content;
    this.text += text;
    tokens.forEach((token, at) => this.place.before(this.token(token, start + at)));
    const rest = text.slice(tokens.map((token) => token.text).join("").length); // was held back until the end
    this.place.before(rest);
    this.count = start + tokens.length;
    if (!this.open.tokens.includes(null)) this.open = { start: this.count, tokens: [] }; // decided, kept or not
    this.measure(forwards);
    this.showOpen();
  }

  /** The open block after a forward; each token keeps the step that filled it. */
  draft({ start, step, tokens, forwards }) {
    const before = this.open.start === start ? this.open.tokens : [];
    const kept = (text, at) => before[at]?.text === text && { ...before[at], isNew: false };
    const filled = (text, at) => kept(text, at) || { text, step, isNew: true };
    this.open = { start, tokens: tokens.map((text, at) => (text === null ? null : filled(text, at))) };
    this.blocks = [...this.blocks.filter((at) => at < start), start];
    this.measure(forwards);
    this.showOpen();
  }

  /** Ends the run, whether whole or not: what is not final leaves the page. */
  close() {
    this.place.remove();
    if (!this.usage) return;
    const { prompt_tokens: prompt, prompt_tokens_details: details, completion_tokens: tokens, diffusion } = this.usage;
    this.count = tokens;
    this.measure(diffusion.forwards, this.seconds);
    const kinds = ["denoise", "commit", "verify"].map((kind) => `${kind} ${diffusion[`${kind}_forwards`]}`);
    this.article.querySelector(".summary").textContent = [
      `${this.seconds.toFixed(2)} s`,
      `forwards: ${kinds.join(", ")}`,
      `blocks: ${diffusion.blocks}`,
      `prompt tokens: ${prompt} (${details?.cached_tokens ?? 0} from the cache)`,
      `seed ${diffusion.seed}`,
    ].join(" · ");
  }

  measure(forwards, seconds = (performance.now() - this.began) / 1000) {
    this.forwards = Math.max(this.forwards, forwards);
    this.seconds = seconds;
    this.rate = seconds ? this.count / seconds : 0;
    const numbers = {
      tokens: this.count,
      forwards: this.forwards,
      tpf: this.forwards ? (this.count / this.forwards).toFixed(2) : "–",
      rate: this.rate.toFixed(1),
    };
    for (const [name, value] of Object.entries(numbers)) {
      this.article.querySelector(`[data-number=${name}]`).textContent = value;
    }
  }

  showOpen() {
    const { start, tokens } = this.open;
    const rest = tokens.slice(Math.max(0, this.count - start));
    const masks = Array(Math.max(0, Math.min(this.blockSize, this.limit - this.count))).fill(null);
    const cell = (token) => (token ? this.token(token) : make("span", { className: "mask" }));
    this.place.replaceChildren(...(rest.length ? rest : masks).map(cell));
  }

  /** One token as an element; a final one has a place, and can be pointed at. */
  token({ text, step, isNew = false }, place = null) {
    const span = make("span", { className: `token step-${Math.min(step, SHADES)}`, textContent: text });
    span.classList.toggle("new", isNew);
    if (place === null) return span;
    const block = Math.max(1, this.blocks.filter((at) => at <= place).length);
    span.classList.toggle("first", this.blockSize > 1 && place > 0 && this.blocks.includes(place));
    span.tabIndex = -1;
    const filled = step ? `filled in step ${step}` : "decided by the prefix";
    if (text) span.dataset.tip = `${JSON.stringify(text)}: ${filled} of block ${block}, token ${place + 1}`;
    return span;
  }

  listen() {
    const tell = ({ target }) => {
      if (target.dataset.tip) this.tip.textContent = target.dataset.tip;
    };
    this.stage.addEventListener("pointerover", tell);
    this.stage.addEventListener("focusin", tell);
    this.stage.addEventListener("keydown", (event) => {
      const tokens = [...this.stage.querySelectorAll("[data-tip]")];
      const at = tokens.indexOf(document.activeElement);
      const last = tokens.length - 1;
      const to = { ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last }[event.key];
      if (to === undefined || !tokens.length) return;
      event.preventDefault();
      tokens[to].focus();
    });
  }
}

/* ---- The form ---- */

let model = null;
let conversation = []; // messages of a chat, the last answer included
let running = null; // the AbortController of the run on the page

const chats = () => byId("form").elements.mode.value === "chat";
const value = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
const policyField = () => byId(byId("policy").value === OTHER ? "parts" : "policy");
const sizeField = () => byId(byId("block-size").value === OTHER ? "other-size" : "block-size");
const say = (text) => (byId("status").textContent = text);

/** The request of the form, as the API takes it. */
function request() {
  const prompt = byId("prompt").value;
  const asked = chats()
    ? { path: "v1/chat/completions", input: { messages: [...conversation, { role: "user", content: prompt }] } }
    : { path: "v1/completions", input: { prompt } };
  const diffusion = {
    policy: policyField().value || null,
    threshold: byId("threshold-field").hidden ? null : value("threshold"),
    block_size: Number(sizeField().value),
    lossless: byId("lossless").checked,
    stream_drafts: true,
  };
  const seed = value("seed");
  const body = {
    model: model.id,
    ...asked.input,
    max_tokens: value("max-tokens"),
    temperature: value("temperature"),
    ...(seed !== null && { seed }),
    stream: true,
    stream_options: { include_usage: true },
    diffusion,
  };
  return { path: asked.path, body };
}

/** The run that was asked for, and after it, where asked for, the same one token at a time. */
async function runs(asked, signal) {
  const { policy: name, block_size: size, lossless } = asked.body.diffusion;
  say("Generating …");
  const way = (lossless ? "lossless, " : "") + (name ?? (lossless ? "the fastest draft" : "threshold"));
  const title = size === 1 ? "One token at a time" : `Blocks of ${size}, ${way}`;
  const first = await decode(asked, new Run(asked, title), signal);
  for (const text of first.usage?.diffusion.warnings ?? []) make("li", { textContent: text }, byId("warnings"));
  if (asked.body.messages) remember(asked.body.messages, first.text);
  const done = `Done: ${first.count} tokens in ${first.forwards} forwards, ${first.seconds.toFixed(2)} s.`;
  say(done);
  if (!byId("compare").checked || byId("compare").disabled) return;
  say(`${done} Now one token at a time …`);
  const seed = first.usage?.diffusion.seed ?? asked.body.seed;
  const alone = { ...asked, body: { ...asked.body, seed, diffusion: { block_size: 1, stream_drafts: true } } };
  const second = await decode(alone, new Run(alone, "One token at a time (AR)"), signal);
  if (!first.count || !second.count) return say(`${done} Nothing to compare: a text is empty.`);
  const ratio = (measure) => (measure(first) / measure(second)).toFixed(2);
  const faster = ratio((run) => run.rate);
  const fewer = ratio((run) => run.count / run.forwards);
  say(`${faster} × the tokens per second of one token at a time, ${fewer} × its tokens per forward.`);
}

async function generate() {
  if (running) return;
  clear();
  running = new AbortController();
  enable(true);
  try {
    if (!model) await load();
    byId("runs").replaceChildren();
    byId("output").hidden = false;
    await runs(request(), running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else fail(error);
  } finally {
    running = null;
    enable(false);
  }
}

/* aria-disabled, and not disabled, which would take the focus away from under the hand */
function enable(isRunning) {
  byId("generate").ariaDisabled = String(isRunning);
  byId("stop").ariaDisabled = String(!isRunning);
}

function clear() {
  say("");
  byId("error").textContent = "";
  byId("warnings").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** One line for what went wrong, and the field that the server named. */
function fail(error) {
  const { message, status, param } = error;
  say("");
  byId("error").textContent = message;
  byId("key-form").hidden = status !== 401;
  if (status === 401) byId("key").focus();
  const field = param ? fieldOf(param) : null;
  if (field) field.ariaInvalid = "true";
  field?.focus();
  if (!(error instanceof Failure)) throw error; // a fault of this page: the console has its place
}

/** The field of the form for a field of the API, which may stand inside another: diffusion.block_size, messages[0]. */
function fieldOf(param) {
  const found = (part) => {
    if (part === "policy") return policyField();
    if (part === "block_size") return sizeField();
    return byId("form").querySelector(`#${CSS.escape(part === "messages" ? "prompt" : part.replaceAll("_", "-"))}`);
  };
  return param.split(/[.[\]]+/).filter(Boolean).map(found).find(Boolean);
}

/** Chat: the messages sent and the answer; the page's list leaves the last answer to the run below it. */
function remember(messages, answer) {
  conversation = [...messages, { role: "assistant", content: answer }];
  byId("prompt").value = "";
  showConversation();
}

function showConversation() {
  byId("conversation").replaceChildren();
  for (const { role, content } of conversation.slice(0, -1)) {
    const who = role === "user" ? "You" : "Model";
    make("li", { className: role, textContent: `${who}: ${content}` }, byId("conversation"));
  }
  byId("conversation").hidden = byId("forget").hidden = !chats() || !conversation.length;
}

/* ---- The model ---- */

async function load() {
  model = (await (await ask("v1/models")).json()).data[0];
  const { blockdiff } = model;
  byId("key-form").hidden = true;
  byId("model").textContent = document.title = model.id;
  const kind = blockdiff.diffusion ? "block diffusion" : "one token at a time (an AR checkpoint)";
  byId("facts").textContent = `${kind} · context of ${blockdiff.context_length} tokens · served by blockdiff`;
  const policies = blockdiff.policies.map(({ name }) => [name, name]);
  fill("policy", [[DEFAULT, "threshold; if lossless, the fastest"], ...policies, [OTHER, "written as parts …"]]);
  fill("block-size", [...blockdiff.block_sizes.map((size) => [size, size]), [OTHER, "another …"]]);
  byId("block-size").value = blockdiff.default_block_size;
  byId("policy").disabled = byId("block-size").disabled = !blockdiff.diffusion;
  byId("max-tokens").max = blockdiff.max_tokens;
  byId("max-tokens").value = Math.min(64, blockdiff.max_tokens);
  byId("modes").hidden = !blockdiff.chat;
  byId("lossless").disabled = !blockdiff.lossless;
  const why = "Not with this model: it was not trained to write one token at a time.";
  byId("lossless-note").textContent = blockdiff.lossless ? "" : why;
  byId("compare").checked = blockdiff.diffusion;
  follow();
}

function fill(id, choices) {
  byId(id).replaceChildren(...choices.map(([value, textContent]) => make("option", { value, textContent })));
}

/** Shows the fields that belong to what is chosen. */
function follow() {
  for (const [select, field] of [["policy", "parts"], ["block-size", "other-size"]]) {
    byId(field).hidden = byId(field).disabled = byId(select).value !== OTHER;
  }
  byId("compare").disabled = !model.blockdiff.diffusion || Number(sizeField().value) === 1;
  const wanted = byId("policy").value || "threshold"; // the server's default
  const chosen = model.blockdiff.policies.find(({ name }) => name === wanted);
  byId("threshold-field").hidden = !chosen?.threshold;
  byId("policy-note").textContent = chosen ? [chosen.parts, chosen.note].filter(Boolean).join("; ") : "";
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("form").addEventListener("change", () => {
  if (model) follow();
  showConversation();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("forget").addEventListener("click", () => {
  conversation = [];
  showConversation();
  byId("prompt").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("api-key", byId("key").value);
  clear();
  byId("key-form").hidden = true;
  model ? generate() : load().catch(fail);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (sends && !byId("key-form").contains(event.target)) byId("form").requestSubmit();
});
load().catch(fail);
