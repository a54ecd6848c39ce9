// Formats numbers and times for people, and fills tables without replacing their rows.

export const NOTHING = "–";

export function seconds(value) {
  if (value === null || value === undefined) return NOTHING;
  if (value >= 7200) return (value / 3600).toFixed(0) + " h";
  if (value >= 120) return (value / 60).toFixed(0) + " min";
  if (value >= 1) return value.toFixed(1) + " s";
  if (value >= 0.1) return (value * 1e3).toFixed(0) + " ms";
  if (value >= 0.001) return (value * 1e3).toFixed(1) + " ms";
  return value ? (value * 1e6).toFixed(0) + " µs" : "0";
}

export function number(value) {
  return value === null || value === undefined ? NOTHING : String(value);
}

// A count, with its digits in groups of three; a pid stays as it is.
export function amount(value) {
  return value === null || value === undefined ? NOTHING : value.toLocaleString("en");
}

export function clock(time) {
  return new Date(time * 1000).toLocaleTimeString([], { hour12: false });
}

export function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Changes only what differs, so that selected text stays selected.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setClass(node, name) {
  if (node.className !== name) node.className = name;
}

const isNothing = (text) => ["0", NOTHING, "0 %", "0.0"].includes(text);

function head(table, columns) {
  const labels = columns.map(([label]) => label).join();
  if (table.dataset.columns === labels) return;
  table.dataset.columns = labels;
  table.tHead?.remove();
  table.tBodies[0]?.remove();
  const row = table.createTHead().insertRow();
  for (const [label, , kind] of columns) {
    const cell = element("th", label, kind);
    cell.scope = "col";
    row.append(cell);
  }
  table.append(element("tbody"));
  setRoles(table);
}

// On narrow screens cells are shown as blocks, and would lose the roles of a table.
function setRoles(table) {
  table.setAttribute("role", "table");
  for (const group of [table.tHead, ...table.tBodies]) group.setAttribute("role", "rowgroup");
  table.tHead.rows[0].setAttribute("role", "row");
  for (const cell of table.tHead.rows[0].cells) cell.setAttribute("role", "columnheader");
}

function added(body, columns) {
  const row = body.insertRow();
  row.setAttribute("role", "row");
  columns.forEach(([label], n) => {
    const cell = element(n ? "td" : "th");
    if (!n) cell.scope = "row";
    cell.setAttribute("role", n ? "cell" : "rowheader");
    cell.dataset.label = label;
    row.append(cell);
  });
  return row;
}

// Columns are [label, text of a row, class]; a text may be [text, class of its cell].
export function fill(table, columns, rows, classOf = () => "") {
  head(table, columns);
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((each, n) => {
    const row = body.rows[n] || added(body, columns);
    setClass(row, classOf(each));
    columns.forEach(([, textOf, kind], index) => {
      const [text, more] = [textOf(each)].flat();
      setText(row.cells[index], text);
      setClass(row.cells[index], [kind, isNothing(text) && "zero", more].filter(Boolean).join(" "));
    });
  });
  table.hidden = rows.length === 0;
}

// Fills a list of labels and values; values that changed stand out.
export function list(dl, pairs) {
  while (dl.children.length > pairs.length) dl.lastChild.remove();
  pairs.forEach(([label, value, moved], n) => {
    const box = dl.children[n] || dl.appendChild(element("div"));
    if (!box.firstChild) box.append(element("dt"), element("dd"));
    setText(box.firstChild, label);
    setText(box.lastChild, amount(value));
    setClass(box.lastChild, moved ? "moved" : value ? "" : "zero");
  });
}
