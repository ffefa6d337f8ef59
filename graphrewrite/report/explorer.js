"use strict";
// Every text of the user's model goes through textContent; groups are built when they are opened.
const SHOWN = 300, SMALL = 200, MANY = 4000;
const tree = document.getElementById("tree"), details = document.getElementById("details");
const search = document.getElementById("search"), found = document.getElementById("found");
const graphs = {};
let graph = null, picked = null;

function make(tag, kind, text) {
  const one = document.createElement(tag);
  if (kind) one.className = kind;
  if (text !== undefined) one.textContent = text;
  return one;
}

function bytes(count) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (count < 1024) return (unit === "B" ? count : count.toFixed(1)) + " " + unit;
    count /= 1024;
  }
  return count.toFixed(1) + " GiB";
}

function type(held) {
  if (held === null) return "";
  if (Array.isArray(held)) return "(" + held.map(type).join(", ") + ")";
  return held.dtype + "[" + held.shape.join(", ") + "]";
}

function load(level) {
  if (graphs[level]) return graphs[level];
  const data = JSON.parse(document.getElementById("graph-" + level).textContent);
  data.root = group("");
  for (const node of data.nodes) { node.users = []; node.mirrored = []; node.results = []; }
  for (const one of data.outputs) data.nodes[one.node].results.push(one.what);
  const rules = Object.fromEntries(data.blocks.map(b => [b.name, b.rule]));
  for (const node of data.nodes) {
    for (const id of node.inputs) data.nodes[id].users.push(node.id);
    if (node.mirrors !== null) data.nodes[node.mirrors].mirrored.push(node.id);
    node.rule = rules[node.block];
    node.text = [node.name, node.target, node.module, node.block, node.source, node.role, node.made_by].join("\n").toLowerCase();
    let at = data.root;
    for (const step of place(node)) at = at.groups[step] = at.groups[step] || group(step, at);
    at.nodes.push(node);
    node.group = at;
    for (; at; at = at.above) { at.count += 1; at.bytes += node.op === "input" ? 0 : node.bytes; }
  }
  return graphs[level] = data;
}

function group(name, above) { return {name, above: above || null, groups: Object.create(null), nodes: [], count: 0, bytes: 0, body: null, head: null}; }

function place(node) {
  if (node.op === "input") return ["inputs"];
  const backward = ["cotangent", "gradient", "accumulate", "signal"].includes(node.role);
  const steps = [backward ? "backward" : "forward", node.block || "(no block)"];
  let rest = node.module;
  if (rest === node.block) rest = "";
  else if (node.block && rest.startsWith(node.block + ".")) rest = rest.slice(node.block.length + 1);
  return rest ? steps.concat(rest.split(".")) : steps;
}

function showGroup(one, into, depth) {
  const head = make("button", "row group");
  head.style.paddingLeft = 1 + depth * 1.1 + "rem";
  head.append(make("span", "", "▸"), make("span", "", one.name), make("span", "count", one.count + (one.count === 1 ? " node, " : " nodes, ") + bytes(one.bytes)));
  head.setAttribute("aria-expanded", "false");
  head.onclick = () => toggle(one, one.body === null || one.body.hidden);
  one.head = head; one.body = null; one.depth = depth;
  into.append(head);
}

function toggle(one, open) {
  if (open && one.body === null) {
    one.body = make("div");
    for (const name in one.groups) showGroup(one.groups[name], one.body, one.depth + 1);
    for (const node of one.nodes) one.body.append(nodeRow(node, one.depth + 1));
    one.head.after(one.body);
  }
  if (one.body) one.body.hidden = !open;
  one.head.firstChild.textContent = open ? "▾" : "▸";
  one.head.setAttribute("aria-expanded", String(open));
}

function all(one, open) {
  for (const name in one.groups) {
    const below = one.groups[name];
    if (open) toggle(below, true);
    if (below.body || open) all(below, open);
    if (!open && below.body) toggle(below, false);
  }
}

function nodeRow(node, depth) {
  const row = make("button", "row node");
  row.style.paddingLeft = 1 + depth * 1.1 + "rem";
  row.dataset.node = node.id;
  row.append(make("span", "name", "%" + node.name), make("span", "type", type(node.type)),
    make("span", "expression", node.expression), make("span", "role " + node.role, node.role));
  row.onclick = () => pick(node.id);
  row.setAttribute("aria-current", String(node.id === picked));
  return row;
}

function draw() {
  tree.replaceChildren();
  const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) {
    const hits = graph.nodes.filter(node => words.every(word => node.text.includes(word)));
    found.textContent = hits.length + " of " + graph.nodes.length + " nodes" + (hits.length > SHOWN ? ", the first " + SHOWN + " shown" : "");
    for (const node of hits.slice(0, SHOWN)) tree.append(nodeRow(node, 0));
    return;
  }
  found.textContent = graph.nodes.length + " nodes";
  for (const name in graph.root.groups) showGroup(graph.root.groups[name], tree, 0);
  if (graph.nodes.length <= SMALL) all(graph.root, true);
  else for (const name in graph.root.groups) if (name !== "inputs") toggle(graph.root.groups[name], true);
}

function reveal(node) {
  const chain = [];
  for (let at = node.group; at.above; at = at.above) chain.unshift(at);
  for (const one of chain) toggle(one, true);
}

function pick(id, jump) {
  picked = id;
  const node = graph.nodes[id];
  if (jump) {
    if (search.value) { search.value = ""; draw(); }
    reveal(node);
  }
  for (const old of tree.querySelectorAll("[aria-current=true]")) old.setAttribute("aria-current", "false");
  const row = tree.querySelector('[data-node="' + id + '"]');
  if (row) {
    row.setAttribute("aria-current", "true");
    if (jump) row.scrollIntoView({block: "center"});
  }
  tell(node);
}

function links(title, ids) {
  if (!ids.length) return;
  details.append(make("h3", "", title));
  for (const id of ids) {
    const other = graph.nodes[id], link = make("button", "link " + other.role, "%" + other.name);
    link.dataset.link = id;
    link.onclick = () => pick(id, true);
    details.append(link);
  }
}

function tell(node) {
  const list = make("dl");
  const rows = [["operator", node.target], ["type", type(node.type)], ["bytes", node.bytes.toLocaleString("en") + " (" + bytes(node.bytes) + ")"],
    ["role", node.role], ["block", node.block && node.rule ? node.block + ", learns by " + node.rule : node.block], ["module", node.module],
    ["source", node.source], ["made by", node.made_by], ["forward pass", node.copy], ["result", node.results.join(", ")], ["expression", node.expression]];
  for (const [name, held] of rows) if (held) list.append(make("dt", "", name), make("dd", name === "role" ? node.role : "", held));
  details.replaceChildren(make("h2", node.role, "%" + node.name), list);
  details.append(picture(node));
  links("derivative of", node.mirrors === null ? [] : [node.mirrors]);
  links("mirrored by", node.mirrored);
  links("reads", node.inputs);
  links("read by", node.users);
}

function picture(node) {
  const NS = "http://www.w3.org/2000/svg", svg = document.createElementNS(NS, "svg");
  const left = node.inputs.slice(0, 6), right = node.users.slice(0, 6);
  const height = 28 * Math.max(left.length, right.length, 1) + 8;
  svg.setAttribute("viewBox", "0 0 390 " + height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "what it reads, and what reads it");
  const add = (tag, into, held, text) => {
    const one = document.createElementNS(NS, tag);
    for (const key in held) one.setAttribute(key, held[key]);
    if (text !== undefined) one.textContent = text;
    into.append(one);
    return one;
  };
  const box = (one, x, y, kind) => {
    const g = add("g", svg, {class: kind + " " + one.role});
    add("rect", g, {x, y: y - 10, width: 116, height: 20, rx: 3});
    add("text", g, {x: x + 5, y: y + 4}, one.name.length > 15 ? one.name.slice(0, 14) + "…" : one.name);
    add("title", g, {}, "%" + one.name);
    if (kind === "neighbour") g.onclick = () => pick(one.id, true);
  };
  const middle = height / 2, y = (i, n) => middle + 28 * (i - (n - 1) / 2);
  left.forEach((id, i) => add("path", svg, {d: `M117 ${y(i, left.length)} C128 ${y(i, left.length)} 126 ${middle} 137 ${middle}`}));
  right.forEach((id, i) => add("path", svg, {d: `M253 ${middle} C264 ${middle} 262 ${y(i, right.length)} 273 ${y(i, right.length)}`}));
  left.forEach((id, i) => box(graph.nodes[id], 1, y(i, left.length), "neighbour"));
  right.forEach((id, i) => box(graph.nodes[id], 273, y(i, right.length), "neighbour"));
  box(node, 137, middle, "centre");
  return svg;
}

function open(level) {
  graph = load(level);
  picked = null;
  for (const tab of document.querySelectorAll(".tab")) tab.setAttribute("aria-selected", String(tab.dataset.level === level));
  details.replaceChildren(make("p", "hint", "Click a node: its mirror, what it reads, what reads it, and where it comes from."));
  document.getElementById("open").disabled = graph.nodes.length > MANY;
  draw();
}

let waiting = 0;
search.oninput = () => { clearTimeout(waiting); waiting = setTimeout(draw, 80); };
search.onkeydown = event => {
  if (event.key === "Escape") { search.value = ""; draw(); }
  const first = tree.querySelector(".node");
  if (event.key === "Enter" && first) pick(Number(first.dataset.node), true);
};
document.getElementById("open").onclick = () => { search.value = ""; draw(); all(graph.root, true); };
document.getElementById("close").onclick = () => { search.value = ""; draw(); all(graph.root, false); };
for (const tab of document.querySelectorAll(".tab")) tab.onclick = () => open(tab.dataset.level);
open(document.body.dataset.level);
