// Shows what is wrong: at the top of the page, in its title and in its icon.

import { element, fill, NOTHING, number, seconds, setClass, setText } from "./words.js";

const byId = (id) => document.getElementById(id);
const icon = byId("icon");
const ICONS = { ok: icon.getAttribute("href"), ...icon.dataset };
export const ALARMING = ["warning", "critical"];

const BLOCKERS = [
  ["session", (each) => (each.pid ? String(each.pid) : each.gid || "prepared")],
  ["who", (each) => [each.application_name, each.client].filter(Boolean).join(", ") || each.owner || NOTHING],
  ["now", (each) => [each.state, each.statement || each.wait].filter(Boolean).join(" in ") || NOTHING],
  ["for", (each) => seconds(each.seconds), "num"],
  ["endpoint", (each) => each.endpoint || NOTHING],
  ["checked out at", (each) => each.where || NOTHING],
  ["worker", (each) => number(each.worker), "num"],
  ["statement", (each) => each.query || NOTHING],
];

function facts(finding, time) {
  const lasted = finding.severity === "ok" ? "" : `for ${seconds(Math.max(0, time - finding.since))}`;
  return [finding.code, finding.pool, lasted].filter(Boolean).join(" · ");
}

function item(finding, time) {
  const made = element("li", undefined, finding.severity);
  made.append(element("span", finding.severity, "badge"), " ", element("strong", finding.text), " ",
    element("span", `(${facts(finding, time)})`, "facts"), " ", finding.do);
  return made;
}

// Leaves out columns without a known value.
export function useful(columns, rows) {
  return columns.filter(([, textOf]) => rows.some((each) => [textOf(each)].flat()[0] !== NOTHING));
}

export function showVerdict(stats) {
  const [first, ...others] = stats.findings || [];
  byId("verdict").hidden = !first;
  if (!first) return;
  const isNews = byId("verdict").dataset.finding !== first.id;
  const isAlarm = ALARMING.includes(first.severity);
  setClass(byId("verdict"), "verdict " + first.severity);
  byId("verdict").dataset.finding = first.id;
  setText(byId("verdict-severity"), first.severity);
  setText(byId("verdict-text"), first.text);
  setText(byId("verdict-do"), first.do);
  setText(byId("verdict-facts"), facts(first, stats.time));
  setText(byId("verdict-explain"), first.severity === "ok" ? "" : `python -m dbpool explain ${first.code}`);
  const blockers = first.evidence?.blockers || [];
  fill(byId("blockers"), useful(BLOCKERS, blockers), blockers);
  byId("verdict-more").replaceChildren(...others.map((finding) => item(finding, stats.time)));
  byId("verdict-more").hidden = others.length === 0;
  document.title = isAlarm ? `${first.severity}: ${first.code} ${first.pool || ""} – dbpool` : "dbpool";
  const wanted = ICONS[first.severity] || ICONS.ok;
  if (icon.getAttribute("href") !== wanted) icon.setAttribute("href", wanted);
  if (isNews && isAlarm) byId("news").textContent = first.text;
}

// Returns a function that names who blocks the session with a pid, as far as the findings say.
export function blockersBySession(findings) {
  const names = new Map();
  const found = new Map();
  for (const { evidence } of findings) {
    for (const each of evidence?.blockers || []) {
      names.set(each.pid, [each.pid || each.gid, each.endpoint || each.application_name].filter(Boolean).join(" "));
    }
    for (const each of evidence?.blocked || []) found.set(each.pid, each.blocked_by || []);
  }
  return (pid) => (found.get(pid) || []).map((each) => names.get(each) || String(each)).join(", ");
}
