"use strict";
// Asks for the statistics each second while the page is seen; shows what comes as text only.

const EVERY = 1000; // milliseconds
const ROUND = 5; // answers; of one round each has at most one of these, so that none is large
const INCLUDES = ["history", "journal", "endpoints"];
const PATIENCE = 5000;

// Not relative: the page's own address may hold the password, with which nothing is fetched.
const address = location.origin + document.body.dataset.stats;

const byId = (id) => document.getElementById(id);
const REMEMBERED = 64; // answers
const earlier = []; // answers, the latest first
let asked = 0;

function seconds(value) {
  if (value >= 7200) return (value / 3600).toFixed(0) + " h";
  if (value >= 120) return (value / 60).toFixed(0) + " min";
  if (value >= 1) return value.toFixed(1) + " s";
  if (value >= 0.001) return (value * 1e3).toFixed(1) + " ms";
  return (value * 1e6).toFixed(0) + " µs";
}

function row(cells, head) {
  const tr = document.createElement("tr");
  cells.forEach((text, index) => {
    const cell = document.createElement(head && index === 0 ? "th" : "td");
    if (cell.tagName === "TH") cell.scope = "row";
    cell.textContent = text;
    tr.append(cell);
  });
  return tr;
}

const totals = (counts) => Object.entries(counts).map(([key, n]) => row([key.replaceAll("_", " "), n], true));

function times(kind, histogram) {
  const quantiles = ["p50", "p95", "p99", "max"].map((q) => (histogram.count ? seconds(histogram[q]) : "–"));
  return row([kind, histogram.count, ...quantiles], true);
}

function section(name) {
  const found = [...byId("pools").children].find((each) => each.dataset.pool === name);
  if (found) return found;
  const made = byId("pool").content.cloneNode(true).firstElementChild;
  made.dataset.pool = name;
  byId("pools").append(made);
  return made;
}

// A pid alone could be that of another container, or be given again.
function isSame(one, other) {
  return one.pid === other.pid && Math.abs(one.start - other.start) < 2; // seconds
}

// The last answer that counts a process of this one: what changed between others means nothing.
function comparable(stats) {
  return earlier.find((last) => last.scope === stats.scope && last.time < stats.time
    && last.processes.some((one) => stats.processes.some((other) => isSame(one, other))));
}

function rate(pool, time, last) {
  if (!last) return "–";
  const checkouts = pool.counters.checkouts - last.pool.counters.checkouts;
  return (Math.max(0, checkouts) / (time - last.time)).toFixed(1) + " /s";
}

// On a narrow screen each cell stands on a line of its own, after the name of its column.
function labelled(tr, table) {
  [...table.tHead.rows[0].cells].forEach((head, n) => { tr.cells[n].dataset.label = head.textContent; });
  return tr;
}

function doing(holder) {
  return holder.waits ? "waits for another connection" : holder.status || "–";
}

function show(name, pool, time, last) {
  const card = section(name);
  const part = (key) => card.querySelector(`[data-${key}]`);
  const text = (key, value) => { part(key).textContent = value; };
  const { breaker, counters } = pool;
  text("name", name);
  text("state", word(pool));
  part("state").className = "state " + word(pool);
  for (const key of ["active", "idle", "connecting"]) {
    text(key, pool[key]);
    card.querySelector(".bar ." + key).style.width = (100 * pool[key]) / Math.max(1, pool.size, pool.max_size) + "%";
  }
  text("size", `${pool.size} of ${pool.max_size}`);
  text("waiting", pool.waiting);
  part("waiting").className = pool.waiting ? "alarm" : "";
  text("rate", rate(pool, time, last));
  text("breaker", breaker.state);
  part("breaker").className = breaker.state === "closed" ? "" : "alarm";
  const since = breaker.since === null ? "" : `failing for ${seconds(Math.max(0, time - breaker.since))}: `;
  part("trouble").hidden = !breaker.last_error;
  text("trouble", since + (breaker.last_error || ""));
  part("times").replaceChildren(...["wait", "use", "connect"].map((kind) => times(kind, pool[kind])));
  const { discarded, ...rest } = counters;
  part("totals").replaceChildren(...totals(rest));
  part("discarded").replaceChildren(...totals(discarded));
  part("held").hidden = pool.holders.length === 0;
  part("holders").replaceChildren(...pool.holders.map((holder) =>
    labelled(row([seconds(holder.seconds), holder.where, holder.endpoint || "–", doing(holder),
      holder.pid || "–", holder.worker || "–", holder.thread]), part("held"))));
  if (last && word(last.pool) !== word(pool)) byId("news").textContent = `${name} is ${word(pool)}`;
}

// The verdict

const ALARMING = ["warning", "critical"];
const icon = byId("icon");
const ICONS = { ok: icon.getAttribute("href"), ...icon.dataset };

function facts(finding, time) {
  const lasted = finding.severity === "ok" ? "" : `for ${seconds(Math.max(0, time - finding.since))}`;
  return [finding.code, finding.severity, finding.pool, lasted].filter(Boolean).join(" · ");
}

function showVerdict(stats) {
  const [first, ...others] = stats.findings || [];
  byId("verdict").hidden = !first;
  if (!first) return;
  const isNews = byId("verdict").dataset.finding !== first.id;
  byId("verdict").className = "verdict " + first.severity;
  byId("verdict").dataset.finding = first.id;
  byId("verdict-text").textContent = first.text;
  byId("verdict-do").textContent = first.do;
  byId("verdict-facts").textContent = facts(first, stats.time);
  byId("verdict-more").replaceChildren(...others.map((finding) => {
    const item = document.createElement("li");
    item.className = finding.severity;
    item.textContent = `${finding.text} (${facts(finding, stats.time)}). ${finding.do}`;
    return item;
  }));
  const isAlarm = ALARMING.includes(first.severity);
  document.title = isAlarm ? `${first.severity}: ${first.code} ${first.pool || ""} – dbpool` : "dbpool";
  icon.href = ICONS[first.severity] || ICONS.ok;
  if (isNews && isAlarm) byId("news").textContent = first.text;
}

// A pool that cannot serve the next caller is neither up nor down.
function word(pool) {
  return pool.state === "up" && pool.waiting && pool.active >= pool.max_size ? "full" : pool.state;
}

function gravity(name, findings) {
  const found = findings.findIndex((finding) => finding.pool === name && ALARMING.includes(finding.severity));
  return found < 0 ? Infinity : found;
}

// The last fifteen minutes

const STRIPS = [["in_use", "in use", String], ["waiting", "waiting", String], ["wait_p95", "wait p95", seconds],
  ["checkouts", "checkouts", String], ["refused", "refused", String]];
const SVG = "http://www.w3.org/2000/svg";

function strip(values, most) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${values.length} 24`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const draw = (shape, name) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    path.setAttribute("d", values.map(shape).join(""));
    svg.append(path);
  };
  draw((value, n) => (value ? `M${n} 24v-${Math.max(1, (22 * value) / most)}h1V24z` : ""), "known");
  draw((value, n) => (value === null ? `M${n} 23h1v1h-1z` : ""), "unknown");
  return svg;
}

function showHistory(stats) {
  for (const [name, series] of Object.entries(stats.history.pools)) {
    if (!(name in stats.pools)) continue;
    const list = section(name).querySelector("[data-strips]");
    list.hidden = false;
    list.replaceChildren(...STRIPS.map(([key, label, shown]) => {
      const values = series[key];
      const known = values.filter((value) => value !== null);
      const most = Math.max(...known, 0);
      const box = document.createElement("div");
      const term = document.createElement("dt");
      const detail = document.createElement("dd");
      box.className = known.some(Boolean) ? key : key + " calm";
      term.textContent = label;
      detail.append(strip(values, most), `at most ${shown(most)}`);
      box.append(term, detail);
      return box;
    }));
  }
}

function showEndpoints(stats) {
  for (const [name, rows] of Object.entries(stats.endpoints)) {
    if (!(name in stats.pools)) continue;
    const card = section(name);
    card.querySelector("[data-used]").hidden = rows.length === 0;
    card.querySelector("[data-endpoints]").replaceChildren(...rows.slice(0, 10).map((each) =>
      row([each.endpoint, each.in_use, (100 * each.use_share).toFixed(0) + " %", seconds(each.longest)], true)));
  }
}

function showJournal(lines) {
  byId("journal").hidden = lines.length === 0;
  byId("lines").replaceChildren(...lines.slice(0, 20).map((line) =>
    row([new Date(line.time * 1000).toLocaleTimeString(), line.pool || "–", line.text])));
}

function summary(stats) {
  const count = stats.processes.length;
  if (stats.scope === "process") return `process ${stats.processes[0].pid} only`;
  return `${count} ${count === 1 ? "process" : "processes"}`;
}

function showAll(stats) {
  const names = Object.keys(stats.pools).sort((a, b) => (b === "default") - (a === "default"));
  const findings = stats.findings || [];
  names.sort((a, b) => (gravity(a, findings) > gravity(b, findings)) - (gravity(a, findings) < gravity(b, findings)));
  showVerdict(stats);
  for (const card of [...byId("pools").children]) if (!(card.dataset.pool in stats.pools)) card.remove();
  for (const each of stats.processes) each.start = stats.time - each.uptime;
  const last = comparable(stats);
  for (const name of names) {
    const before = last && last.pools[name];
    show(name, stats.pools[name], stats.time, before && { time: last.time, pool: before });
  }
  names.forEach((name, n) => {
    const card = section(name);
    if (byId("pools").children[n] !== card) byId("pools").insertBefore(card, byId("pools").children[n]);
  });
  if (stats.history) showHistory(stats);
  if (stats.endpoints) showEndpoints(stats);
  if (stats.journal) showJournal(stats.journal);
  byId("processes").replaceChildren(...stats.processes.map((each) =>
    row([each.pid, seconds(each.age) + " ago", seconds(each.uptime)])));
  byId("summary").textContent = summary(stats);
  byId("alone").hidden = stats.scope !== "process";
  earlier.unshift(stats);
  earlier.splice(REMEMBERED);
}

async function refresh() {
  try {
    const wanted = INCLUDES[asked++ % ROUND];
    const answer = await fetch(address + (wanted ? "?include=" + wanted : ""), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error("HTTP " + answer.status);
    showAll(await answer.json());
    document.body.className = "";
  } catch (error) {
    byId("summary").textContent = "no answer: " + error.message;
    document.body.className = "stale";
  }
}

const isPaused = () => byId("pause").getAttribute("aria-pressed") === "true";

byId("pause").addEventListener("click", () => {
  byId("pause").setAttribute("aria-pressed", String(!isPaused()));
  if (isPaused()) byId("summary").textContent = "paused";
});

async function run() {
  if (!document.hidden && !isPaused()) await refresh();
  setTimeout(run, EVERY);
}

run();
