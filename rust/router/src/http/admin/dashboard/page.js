"use strict";
// The page: asks the router once a second, keeps three minutes, and draws. It changes nothing at the router.

const PERIOD_MS = 1000;
/** Figures are over this many readings: ten seconds. */
const WINDOW = 10;
/** Readings that the plots show: three minutes. */
const KEPT = 180;
const KEY = "orchestra-admin-key";

const number = (digits, unit = "") => (value) => (value === null ? "–" : value.toFixed(digits) + unit);
const milliseconds = (value) => (value === null ? "–" : `${(1000 * value).toFixed(value < 0.1 ? 1 : 0)} ms`);
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);

const FIGURES = [
  ["running", "requests running", (_, now) => now.sum("requests_running"), number(0), true],
  ["waiting", "requests waiting", (_, now) => now.sum("requests_waiting"), number(0)],
  ["tokens", "tokens a second", (old, now) => rate(old, now, "generation_tokens_total"), number(0), true],
  ["ttft", "time to first token, median", (old, now) => quantile(old, now, "time_to_first_token_seconds", 0.5), milliseconds],
  ["ttft99", "time to first token, p99", (old, now) => quantile(old, now, "time_to_first_token_seconds", 0.99), milliseconds, true],
  ["tpot", "time per output token, median", (old, now) => quantile(old, now, "time_per_output_token_seconds", 0.5), milliseconds],
  ["cached", "prompt tokens from caches", (old, now) => share(old, now, "prefix_cache_hit_tokens_total", "prompt_tokens_total"), percent],
  ["refused", "refused a second", (old, now) => rate(old, now, "requests_rejected_total"), number(1)],
];
/** Counters of what became of things, by the label that says so. */
const ENDS = [
  ["requests_finished_total", "choices", "reason"],
  ["requests_rejected_total", "requests refused", "reason"],
  ["engine_attempts_total", "attempts at engines", "outcome"],
  ["requests_replayed_total", "streams that broke at an engine", "outcome"],
  ["kv_moves_total", "KV from another worker", "outcome"],
];

const element = (id) => document.getElementById(id);
/** An element with a class and children; text is always text. */
function make(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}
const cell = (text, className = "") => make("td", className, String(text));

const readings = [];
const values = new Map(FIGURES.map(([id]) => [id, []]));

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { headers, signal: AbortSignal.timeout(5000) });
  if (response.status === 401 || response.status === 403) throw new Refused();
  if (!response.ok) throw new Error(`the router answers ${response.status}`);
  return response;
}
class Refused extends Error {}

function say(text, className) {
  element("status").textContent = text;
  element("status").className = className;
}

function table(id, rows) {
  element(id).tBodies[0].replaceChildren(...rows.map((cells) => make("tr", "", ...cells)));
  element(id).hidden = rows.length === 0;
  element(id).nextElementSibling.hidden = rows.length > 0;
}

function usage(worker) {
  const used = worker.kv_blocks - worker.kv_blocks_free;
  const meter = make("meter", "");
  Object.assign(meter, { min: 0, max: worker.kv_blocks, high: 0.9 * worker.kv_blocks, value: used });
  return make("td", "", meter, ` ${used} of ${worker.kv_blocks}`);
}

function showPool({ workers, engines }) {
  const colour = (isGood) => (isGood ? "good" : "warn");
  table("workers", workers.map((worker) => [
    cell(worker.id), cell(worker.model), cell(worker.role), cell(worker.state, colour(worker.state === "ready")),
    cell(worker.sequences, "number"), cell(worker.queued_prefill_tokens, "number"), usage(worker),
    cell(worker.cached_blocks, "number"),
  ]));
  table("engines", engines.map((engine) => [
    cell(engine.config.url), cell(engine.kind), cell(engine.models.join(", ")),
    engine.is_up ? cell(engine.is_draining ? "draining" : "up", colour(!engine.is_draining)) : cell("down", "bad"),
    cell(engine.breaker, colour(engine.breaker === "closed")), cell(engine.num_running, "number"),
  ]));
  const isServing = workers.some((worker) => worker.state === "ready") ||
    engines.some((engine) => engine.is_up && !engine.is_draining && engine.breaker !== "open");
  say(isServing ? "serving" : "no worker takes requests", isServing ? "good" : "bad");
}

function showEnds(now) {
  const rows = ENDS.flatMap(([name, what, label]) => {
    const counts = new Map();
    for (const { labels, value } of now.all(name)) counts.set(labels[label], (counts.get(labels[label]) ?? 0) + value);
    return [...counts].filter(([, count]) => count > 0).map(([end, count]) => [cell(what), cell(end), cell(count, "number")]);
  });
  table("ends", rows);
}

function plot(label, format, line) {
  const known = line.filter((value) => value !== null);
  const top = Math.max(...known, 0);
  const points = line.flatMap((value, at) =>
    value === null ? [] : [`${KEPT - line.length + at},${70 - (66 * value) / (top || 1)}`]);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${KEPT} 72`);
  svg.setAttribute("preserveAspectRatio", "none");
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  drawn.setAttribute("points", points.join(" "));
  svg.append(drawn);
  const range = known.length ? `at most ${format(top)}` : "";
  return make("figure", "", make("figcaption", "", make("span", "", label), make("span", "", range)), svg);
}

function showFigures(now) {
  const before = readings.at(-WINDOW - 1) ?? readings[0];
  const tiles = [];
  const plots = [];
  for (const [id, label, figure, format, isPlotted] of FIGURES) {
    const value = figure(before, now);
    const line = values.get(id);
    line.push(value);
    line.splice(0, line.length - KEPT);
    tiles.push(make("div", "tile", make("b", "", format(value)), make("span", "", label)));
    if (isPlotted) plots.push(plot(label, format, line));
  }
  element("tiles").replaceChildren(...tiles);
  element("plots").replaceChildren(...plots);
  element("version").textContent = now.all("build_info")[0]?.labels.version ?? "";
}

async function look() {
  try {
    const [pool, metrics] = await Promise.all([ask("/admin/workers"), ask("/metrics")]);
    const now = new Reading(await metrics.text(), Date.now());
    showFigures(now);
    showEnds(now);
    showPool(await pool.json());
    readings.push(now);
    readings.splice(0, readings.length - WINDOW - 1);
    document.querySelector("main").hidden = false;
    element("key-form").hidden = true;
  } catch (error) {
    if (error instanceof Refused) {
      say("the admin key is missing or wrong", "bad");
      element("key-form").hidden = false;
      return;
    }
    say(`no answer from the router: ${error.message}`, "bad");
  }
  setTimeout(look, PERIOD_MS);
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, element("key").value);
  look();
});
look();
