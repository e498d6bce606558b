"use strict";
// Reading the router's metrics: the OpenMetrics text, rates between two readings, quantiles of histograms.

/** The samples of an OpenMetrics text: `[{ name, labels, value }]`. Comments and unreadable lines are left out. */
function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^([a-z_][a-z0-9_]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? ([^ ]+)/i.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/([a-z_][a-z0-9_]*)="((?:[^"\\]|\\.)*)"/gi)) {
      labels[name] = value.replace(/\\(.)/g, (_, escaped) => (escaped === "n" ? "\n" : escaped));
    }
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** One reading of the metrics, taken at `at` (milliseconds). */
class Reading {
  constructor(text, at) {
    this.at = at;
    this.samples = parseMetrics(text);
  }

  all(name) {
    return this.samples.filter((sample) => sample.name === `orchestra_${name}`);
  }

  /** The sum over all labels; 0 where there is no such series. */
  sum(name) {
    return this.all(name).reduce((total, sample) => total + sample.value, 0);
  }
}

/** What a counter gained a second between two readings; null without two, or where the router has restarted. */
function rate(before, now, name) {
  if (!before || now.at <= before.at) return null;
  const gained = now.sum(name) - before.sum(name);
  return gained < 0 ? null : (1000 * gained) / (now.at - before.at);
}

/** The share of `part` in `whole` of what was counted between two readings; null where nothing was. */
function share(before, now, part, whole) {
  const all = rate(before, now, whole);
  const some = rate(before, now, part);
  return all && some !== null ? some / all : null;
}

/**
 * A quantile of what a histogram observed between two readings, interpolated within its bucket as Prometheus does;
 * null where it observed nothing.
 */
function quantile(before, now, name, q) {
  if (!before) return null;
  const old = new Map(before.all(`${name}_bucket`).map((sample) => [sample.labels.le, sample.value]));
  const buckets = now
    .all(`${name}_bucket`)
    .map((sample) => ({
      end: sample.labels.le === "+Inf" ? Infinity : Number(sample.labels.le),
      count: sample.value - (old.get(sample.labels.le) ?? 0),
    }))
    .sort((a, b) => a.end - b.end);
  const total = buckets.at(-1)?.count ?? 0;
  if (total <= 0) return null;
  const rank = q * total;
  const at = buckets.findIndex((bucket) => bucket.count >= rank);
  const start = at > 0 ? buckets[at - 1] : { end: 0, count: 0 };
  const bucket = buckets[at];
  if (bucket.end === Infinity) return start.end;
  return start.end + ((bucket.end - start.end) * (rank - start.count)) / Math.max(1, bucket.count - start.count);
}

// For tests outside of a browser; there is no `module` in a page.
if (typeof module !== "undefined") module.exports = { parseMetrics, Reading, rate, share, quantile };
