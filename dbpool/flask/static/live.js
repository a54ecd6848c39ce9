"use strict";
// Asks for the statistics every second while the page is seen, and shows them as text only.

const pools = document.getElementById("pools");
const summary = document.getElementById("summary");
const template = document.getElementById("pool");

function seconds(value) {
  if (value >= 100) return value.toFixed(0) + " s";
  if (value >= 1) return value.toFixed(1) + " s";
  if (value >= 0.001) return (value * 1e3).toFixed(1) + " ms";
  return (value * 1e6).toFixed(0) + " µs";
}

function row(head, cells) {
  const tr = document.createElement("tr");
  if (head !== null) {
    const th = document.createElement("th");
    th.scope = "row";
    th.textContent = head;
    tr.append(th);
  }
  for (const cell of cells) {
    const td = document.createElement("td");
    td.textContent = cell;
    tr.append(td);
  }
  return tr;
}

function section(name) {
  for (const found of pools.children) if (found.dataset.pool === name) return found;
  pools.append(template.content.cloneNode(true));
  const made = pools.lastElementChild;
  made.dataset.pool = name;
  made.querySelector("[data-name]").textContent = name;
  return made;
}

function show(name, pool) {
  const part = (key) => section(name).querySelector("[data-" + key + "]");
  part("state").textContent = pool.state;
  part("state").className = "state " + pool.state;
  const bar = section(name).querySelector(".bar");
  for (const key of ["active", "idle", "connecting"]) {
    bar.querySelector("." + key).style.width = (100 * pool[key]) / Math.max(1, pool.max_size) + "%";
  }
  const sizes = `${pool.active} active, ${pool.idle} idle, ${pool.connecting} connecting: ` +
    `${pool.size} of at most ${pool.max_size}; ${pool.waiting} waiting`;
  part("sizes").textContent = sizes;
  bar.setAttribute("aria-label", sizes);
  const breaker = pool.breaker;
  part("trouble").hidden = breaker.state === "closed" && !breaker.last_error;
  part("trouble").textContent = `breaker ${breaker.state}: ${breaker.last_error || ""}`;
  part("times").replaceChildren(...["wait", "use", "connect"].map((key) => row(key, [
    pool[key].count, ...["p50", "p95", "p99", "max"].map((q) => seconds(pool[key][q]))])));
  const { discarded, ...totals } = pool.counters;
  const lost = Object.entries(discarded).map(([reason, n]) => ["discarded " + reason, n]);
  part("counters").replaceChildren(...Object.entries(totals).concat(lost)
    .map(([key, n]) => row(key.replaceAll("_", " "), [n])));
  part("held").hidden = pool.holders.length === 0;
  part("holders").replaceChildren(...pool.holders.map((holder) => row(null, [
    seconds(holder.seconds), holder.thread, holder.where, holder.endpoint || ""])));
}

async function refresh() {
  try {
    const answer = await fetch(document.body.dataset.stats, { cache: "no-store" });
    if (!answer.ok) throw new Error("HTTP " + answer.status);
    const stats = await answer.json();
    for (const [name, pool] of Object.entries(stats.pools)) show(name, pool);
    const parts = stats.processes.map((p) => `${p.pid} (${seconds(p.age)} old)`).join(", ");
    summary.textContent = (stats.scope === "all" ? "processes " : "this process only: ") + parts;
    summary.className = "";
  } catch (error) {
    summary.textContent = "no answer: " + error.message;
    summary.className = "stale";
  }
}

function tick() {
  const asked = document.hidden ? Promise.resolve() : refresh();
  asked.finally(() => setTimeout(tick, 1000));
}

tick();
