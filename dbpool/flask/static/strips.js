// Charts of the last 15 minutes of a pool: five strips on one time axis, with a cursor over them.

import { clock, element, number, seconds, setClass, setText } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 28;
const TAIL = 20; // seconds that are fetched again, since workers may be late
const rate = (value) => (value === null ? number(value) : (value / 5).toFixed(value < 50 ? 1 : 0) + " /s");

// The series, its label, how a value is shown, and the value from which on it stands out.
const STRIPS = [["in_use", "in use", number, Infinity], ["waiting", "waiting", number, 1], ["wait_p95", "wait p95", seconds, 0.1],
  ["checkouts", "checkouts", rate, Infinity], ["refused", "refused", number, 1]];

const known = {}; // by pool: the series, the last minute, the time of their end, and their step
let isShared = false; // whether all workers return the same series

// Returns the parameter that asks only for what is new, and a little more.
export function newer(name) {
  return known[name] && isShared ? `&since=${(known[name].until - TAIL).toFixed(1)}` : "";
}

export function remember(history, scope) {
  isShared = scope === "all";
  for (const [name, series] of Object.entries(history.pools)) {
    const isFull = Object.values(series)[0]?.length === 180;
    const before = known[name];
    if (!isFull && !before) continue;
    known[name] = { ...history, series: isFull ? series : joined(before, series, history), minute: history.minute?.[name] };
  }
}

function joined(before, series, history) {
  const moved = Math.round((history.until - before.until) / history.step);
  const result = {};
  for (const [key, values] of Object.entries(series)) {
    const all = [...(before.series[key] || []), ...Array(Math.max(0, moved)).fill(null)];
    result[key] = [...all.slice(0, all.length - values.length), ...values].slice(-180);
  }
  return result;
}

export const minute = (name) => known[name]?.minute;

function chart() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 180 ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  for (const name of ["unknown", "known", "high", "cursor"]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    svg.append(path);
  }
  return svg;
}

function draw(svg, values, most, at, limit) {
  const [unknown, bars, high, cursor] = svg.children;
  const bar = (value, n) => (value ? `M${n} ${HEIGHT}v-${Math.max(1.5, ((HEIGHT - 2) * value) / most).toFixed(1)}h1V${HEIGHT}z` : "");
  const drawn = (isHigh) => values.map((value, n) => (value >= limit === isHigh ? bar(value, n) : "")).join("");
  bars.setAttribute("d", drawn(false));
  high.setAttribute("d", drawn(true));
  unknown.setAttribute("d", values.map((value, n) => (value === null ? `M${n} ${HEIGHT - 1}h1v1h-1z` : "")).join(""));
  cursor.setAttribute("d", at < 179 ? `M${at} 0h.8V${HEIGHT}h-.8z` : "");
}

function latest(values) {
  return values.findLast((value) => value !== null) ?? null;
}

export function show(card, name) {
  const series = known[name]?.series;
  card.querySelector("[data-history]").hidden = !series;
  if (!series) return;
  const dl = card.querySelector("[data-strips]");
  const cursor = card.querySelector("[data-cursor]");
  cursor.oninput = () => show(card, name);
  const at = Number(cursor.value);
  const said = STRIPS.map(([key, label, shown, limit], n) => {
    const values = series[key];
    const most = Math.max(...values.filter((value) => value !== null), 0);
    const box = dl.children[n] || dl.appendChild(element("div"));
    if (!box.firstChild) box.append(element("dt", label), chart(), element("dd"), element("dd"));
    const [, svg, now, peak] = box.children;
    setClass(box, most ? key : key + " calm");
    draw(svg, values, most, at, limit);
    const text = shown(at < 179 ? values[at] : latest(values));
    setText(now, text);
    setText(peak, `peak ${shown(most)}`);
    return `${label} ${text}`;
  });
  const time = clock(known[name].until - (179 - at) * known[name].step);
  cursor.setAttribute("aria-valuetext", `${at < 179 ? time : "now"}: ${said.join(", ")}`);
  setText(card.querySelector(".ticks").lastChild, at < 179 ? time : "now");
}
