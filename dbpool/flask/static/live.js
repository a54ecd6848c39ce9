// Fetches the statistics each second while the page is visible, and shows them as text only.

import * as strips from "./strips.js";
import { ALARMING, blockersBySession, showVerdict, useful } from "./verdict.js";
import { amount, clock, fill, list, NOTHING, number, seconds, setClass, setText } from "./words.js";

const INTERVAL = 1000; // milliseconds
const FIRST_INTERVAL = 100; // until each part has arrived once
const TIMEOUT = 5000;
const REMEMBERED = 64; // answers
const LIMIT = 20; // lines of each list
// Not relative: the page's own URL may contain the password, and fetch() refuses such URLs.
const address = location.origin + document.body.dataset.stats;
const byId = (id) => document.getElementById(id);
const earlier = []; // answers, latest first
const parts = {}; // the latest version of each
let asked = 0;
let isFirstRound = true;

// Each answer has one of these parts, for one pool, so that no answer is large.
function schedule(names) {
  return [() => "journal", ...names.flatMap((name) => {
    const only = "&pool=" + encodeURIComponent(name);
    return [() => "history" + only + strips.newer(name), () => "endpoints" + only, () => "workers" + only];
  }), about];
}

// This part changes rarely. Health asks the server for it over a connection of the pool.
function about(round) {
  if (round % 12 === 0) return "servers,settings";
  return round % 3 === 0 ? "servers" : "";
}

function nextQuery() {
  const names = Object.keys(earlier[0]?.pools || {});
  const parts = schedule(names);
  const at = asked % parts.length;
  const wanted = parts[at](Math.floor(asked / parts.length));
  isFirstRound = asked < parts.length || names.length === 0;
  asked += 1;
  const limit = Math.max(6, Math.floor(LIMIT / (names.length || 3))); // at first the number is unknown
  return `?include=${wanted}&limit=${limit}`;
}

function section(name) {
  const found = [...byId("pools").children].find((each) => each.dataset.pool === name);
  if (found) return found;
  const made = byId("pool").content.cloneNode(true).firstElementChild;
  made.dataset.pool = name;
  byId("pools").append(made);
  return made;
}

// A pid alone could belong to another container, or be used again.
function isSame(one, other) {
  return one.pid === other.pid && Math.abs(one.start - other.start) < 2; // seconds
}

// The last answer with a process that this one has too: only then their difference means something.
function comparable(stats) {
  return earlier.find((last) => last.scope === stats.scope && last.time < stats.time
    && last.processes.some((one) => stats.processes.some((other) => isSame(one, other))));
}

function rate(pool, time, last) {
  if (!last) return NOTHING;
  const checkouts = pool.counters.checkouts - last.pool.counters.checkouts;
  return (Math.max(0, checkouts) / (time - last.time)).toFixed(1) + " /s";
}

// A pool that is up but cannot serve the next caller is shown as "full".
function word(pool) {
  return pool.state === "up" && pool.waiting && pool.active >= pool.max_size ? "full" : pool.state;
}

function severityRank(name, findings) {
  const found = findings.findIndex((finding) => finding.pool === name && ALARMING.includes(finding.severity));
  return found < 0 ? Infinity : found;
}

const quantile = (key) => (each) => (each.count ? seconds(each[key]) : NOTHING);
const MINUTE = [["time", (each) => each.kind], ["count", (each) => amount(each.count), "num"],
  ...["p50", "p95", "p99"].map((key) => [key, quantile(key), "num"])];
const TIMES = [...MINUTE, ["max", quantile("max"), "num"]];
const KINDS = ["wait", "use", "connect"];
const ENDPOINTS = [
  ["endpoint", (each) => each.endpoint],
  ["in use", (each) => each.in_use.toFixed(1), "num"],
  ["share", (each) => (each.use_share === null ? NOTHING : (100 * each.use_share).toFixed(0) + " %"), "num"],
  ["longest", (each) => seconds(each.longest), "num"],
  ["checkouts", (each) => amount(each.checkouts), "num"],
  ["use p95", (each) => seconds(each.use_p95), "num"],
  ["wait p95", (each) => seconds(each.wait_p95), "num"],
  ["gave up", (each) => amount(each.gave_up || null), "num"],
  ["forgotten", (each) => amount(each.forgotten || null), "num"],
];
const WORKERS = [
  ["worker", (each) => String(each.pid)],
  ["seen", (each) => [seconds(each.age) + " ago", each.age > Math.max(10, 2 * (each.interval || 0)) && "alarm"], "num"],
  ["up for", (each) => seconds(each.uptime), "num"],
  ["state", (each) => [each.state, each.state === "down" && "alarm"]],
  ["in use", (each) => `${each.in_use} of ${each.max_size}`, "num"],
  ["waiting", (each) => [amount(each.waiting), each.waiting && "warn"], "num"],
  ["checkouts", (each) => amount(each.checkouts), "num"],
  ["refused", (each) => [amount(each.refused), each.refused && "warn"], "num"],
  ["used for", (each) => seconds(each.use_seconds), "num"],
];
const SETTINGS = [["setting", (each) => each.name], ["value", (each) => shownValue(each.value)],
  ["from", (each) => [each.source, each.source === "default" && "zero"]]];
const LINES = [["at", (each) => clock(each.time)], ["pool", (each) => each.pool || NOTHING], ["what", (each) => each.text]];

function shownValue(value) {
  if (value === null || value === "") return NOTHING;
  return Array.isArray(value) ? value.join(", ") : String(value);
}

function doing(holder) {
  if (holder.waits) return ["waits for another connection", "alarm"];
  return [holder.status || NOTHING, /idle in/.test(holder.status) && "warn"];
}

function holdersColumns(blockers) {
  return [
    ["for", (each) => seconds(each.seconds), "num"],
    ["checked out at", (each) => each.where],
    ["endpoint", (each) => each.endpoint || NOTHING],
    ["now", doing],
    ["blocked by", (each) => [blockers(each.pid) || NOTHING, "alarm"]],
    ["session", (each) => number(each.pid || null), "num"],
    ["worker", (each) => number(each.worker || null), "num"],
    ["thread", (each) => each.thread],
  ];
}

function serverText(server, time) {
  if (!server) return "";
  const isOld = time - server.time > 60;
  return [
    `PostgreSQL ${server.version || NOTHING}`, server.role, server.latency === null ? "" : `latency ${seconds(server.latency)}`,
    server.lag === null ? "" : `lag ${seconds(server.lag)}`, server.tls ? "TLS" : "no TLS",
    `${number(server.used)} of ${number(server.max)} connections used, ${number(server.ours)} ours`,
    isOld ? `${seconds(time - server.time)} ago` : "",
  ].filter(Boolean).join(" · ");
}

function totals(counts, before) {
  return Object.entries(counts).map(([key, n]) => [key.replaceAll("_", " "), n, before && n !== before[key]]);
}

function showPool(name, pool, stats, last) {
  const card = section(name);
  const part = (key) => card.querySelector(`[data-${key}]`);
  const text = (key, value) => setText(part(key), String(value));
  const { breaker, counters } = pool;
  text("name", name);
  text("state", word(pool));
  setClass(part("state"), "state " + word(pool));
  text("server", serverText(parts.servers?.[name], stats.time));
  const most = Math.max(1, pool.size, pool.max_size);
  for (const key of ["active", "idle", "connecting"]) {
    text(key, pool[key]);
    setClass(part(key), pool[key] ? "" : "zero");
    const piece = card.querySelector(".bar ." + key);
    piece.style.width = (100 * pool[key]) / most + "%";
    piece.hidden = !pool[key];
  }
  text("size", `${pool.size} of ${pool.max_size}`);
  text("waiting", pool.waiting);
  setClass(part("waiting"), pool.waiting ? "alarm" : "zero");
  text("rate", rate(pool, stats.time, last));
  setClass(part("rate"), /^0.0|–/.test(part("rate").textContent) ? "zero" : "");
  text("breaker", breaker.state);
  setClass(part("breaker"), breaker.state === "closed" ? "zero" : "alarm");
  const since = breaker.since === null ? "" : `failing for ${seconds(Math.max(0, stats.time - breaker.since))}: `;
  part("trouble").hidden = !breaker.last_error;
  text("trouble", since + (breaker.last_error || ""));
  const minute = strips.minute(name);
  fill(part("minute"), MINUTE, minute ? KINDS.map((kind) => ({ kind, ...minute[kind] })) : []);
  fill(part("times"), TIMES, KINDS.map((kind) => ({ kind, ...pool[kind] })));
  const { discarded, ...rest } = counters;
  list(part("totals"), totals(rest, last?.pool.counters));
  list(part("discarded"), totals(discarded, last?.pool.counters.discarded));
  const holders = holdersColumns(blockersBySession(stats.findings || []));
  fill(part("held"), useful(holders, pool.holders), pool.holders);
  strips.show(card, name);
  const endpoints = parts.endpoints?.[name] || [];
  fill(part("used"), useful(ENDPOINTS, endpoints), endpoints);
  fill(part("workers"), WORKERS, parts.workers?.[name] || []);
  const settings = parts.settings?.pools?.[name] || [];
  part("settings").hidden = settings.length === 0;
  fill(part("rows"), SETTINGS, settings);
  if (last && word(last.pool) !== word(pool)) byId("news").textContent = `${name} is ${word(pool)}`;
}

function summary(stats) {
  const count = stats.processes.length;
  if (stats.scope === "process") return `process ${stats.processes[0].pid} only`;
  const known = stats.processes.filter((each) => each.threads && each.busy !== null);
  const total = (key) => known.reduce((sum, each) => sum + each[key], 0);
  const threads = known.length ? `, ${total("busy")} of ${total("threads")} threads busy` : "";
  return `${count} ${count === 1 ? "process" : "processes"}${threads}`;
}

function showAll(stats) {
  const findings = stats.findings || [];
  const names = Object.keys(stats.pools).sort((a, b) => (b === "default") - (a === "default"));
  names.sort((a, b) => severityRank(a, findings) - severityRank(b, findings) || 0);
  for (const each of stats.processes) each.start = stats.time - each.uptime;
  if (stats.history) strips.remember(stats.history, stats.scope);
  for (const part of ["endpoints", "workers", "servers"]) parts[part] = { ...parts[part], ...stats[part] };
  for (const part of ["journal", "settings"]) parts[part] = stats[part] || parts[part];
  showVerdict(stats);
  const last = comparable(stats);
  for (const name of names) {
    const before = last && last.pools[name];
    showPool(name, stats.pools[name], stats, before && { time: last.time, pool: before });
  }
  names.forEach((name, n) => {
    const card = section(name);
    if (byId("pools").children[n] !== card) byId("pools").insertBefore(card, byId("pools").children[n]);
  });
  fill(byId("lines"), LINES, parts.journal || []);
  byId("journal").hidden = !parts.journal?.length;
  fill(byId("application-settings"), SETTINGS, parts.settings?.application || []);
  byId("application").hidden = !parts.settings?.application;
  setText(byId("summary"), summary(stats));
  byId("alone").hidden = stats.scope !== "process";
  earlier.unshift(stats);
  earlier.splice(REMEMBERED);
}

async function refresh() {
  try {
    const answer = await fetch(address + nextQuery(), {
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT),
      headers: { "X-Requested-With": "fetch" }, // without it the browser may open its own password dialog
    });
    byId("signed-out").hidden = answer.status !== 401;
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
  setTimeout(run, isFirstRound ? FIRST_INTERVAL : INTERVAL);
}

run();
