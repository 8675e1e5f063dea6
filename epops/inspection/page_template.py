"""HTML, style and script of the page; ``__DATA__`` stands for the graphs."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>epops.inspect</title>
<style>
  :root { --ink: #1d2430; --soft: #66707f; --line: #c9d0da; --paper: #ffffff; --ground: #f4f6f9;
          --exchange: #d9480f; --product: #1864ab; --other: #5c6773; --mark: #2b8a3e; }
  * { box-sizing: border-box; }
  body { margin: 0; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
  header { padding: 14px 20px 10px; background: var(--paper); border-bottom: 1px solid var(--line); }
  h1 { font-size: 18px; margin: 0 0 8px; }
  button { font: inherit; padding: 3px 12px; margin-right: 6px; border: 1px solid var(--line); border-radius: 5px;
           background: var(--paper); cursor: pointer; }
  button[aria-pressed="true"] { background: var(--ink); color: var(--paper); }
  label { margin-left: 10px; color: var(--soft); }
  .legend span { margin-right: 16px; color: var(--soft); }
  .legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; vertical-align: -1px; }
  ul.facts { margin: 8px 0 4px; padding-left: 20px; font: 12.5px/1.5 ui-monospace, monospace; max-height: 9.5em; overflow: auto; }
  main { display: flex; gap: 14px; padding: 14px 20px 120px; align-items: flex-start; }
  section { flex: 1 1 0; min-width: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
            overflow-x: auto; }
  h2 { font-size: 14px; margin: 0; padding: 9px 14px; border-bottom: 1px solid var(--line); position: sticky; left: 0; }
  svg { display: block; }
  .node rect { fill: var(--paper); stroke-width: 1.3; rx: 5; }
  .node text { font: 12px ui-monospace, monospace; fill: var(--ink); }
  .node .shape { fill: var(--soft); font-size: 11px; }
  .exchange rect { stroke: var(--exchange); fill: #fff4ee; }
  .product rect { stroke: var(--product); fill: #eef5fc; }
  .other rect, .output rect { stroke: var(--line); }
  .input rect { stroke: var(--line); stroke-dasharray: 3 3; }
  .marked rect { stroke: var(--mark); stroke-width: 2.6; }
  .node:hover rect, .node:focus rect { filter: brightness(0.95); }
  .node { outline: none; cursor: default; }
  path.edge { fill: none; stroke: #aeb7c4; stroke-width: 1; }
  path.edge.order { stroke-dasharray: 4 3; stroke: var(--exchange); }
  path.edge.lit { stroke: var(--ink); stroke-width: 2; }
  rect.flight { fill: var(--exchange); opacity: 0.16; }
  #detail { position: fixed; left: 0; right: 0; bottom: 0; min-height: 64px; max-height: 40vh; overflow: auto; padding: 10px 20px;
            background: var(--ink); color: #eef1f5; font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap;
            overflow-wrap: anywhere; }
</style>
</head>
<body>
<header>
  <h1 id="title"></h1>
  <div id="tabs"></div>
  <ul class="facts" id="facts"></ul>
  <div class="legend">
    <span><i style="background:var(--exchange)"></i>exchange</span>
    <span><i style="background:var(--product)"></i>matrix product</span>
    <span><i style="background:var(--mark)"></i>changed by a pass</span>
    <span><i style="background:var(--exchange);opacity:.3"></i>exchange under way</span>
    <label><input type="checkbox" id="all"> all nodes</label>
  </div>
</header>
<main>
  <section><h2 id="before-heading">Before</h2><div id="before"></div></section>
  <section><h2 id="after-heading">After</h2><div id="after"></div></section>
</main>
<div id="detail" role="status">Point at a node to see what it computes.</div>
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const ROW = 34, WIDE = 290, LANES = { exchange: 34, product: 350, other: 350, input: 350, output: 350 };
let current = 0;

function make(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function short(text, length) {
  return text.length > length ? text.slice(0, length - 1) + "\\u2026" : text;
}

function isShown(node) {
  return document.getElementById("all").checked || node.marked || node.kind === "exchange" || node.kind === "product";
}

// A row for each shown node of both sides: nodes that both have are level with each other, as far as their order allows.
function level(before, after) {
  const place = new Map(before.map((node, index) => [node.twin, index]));
  const pairs = after.flatMap((node, index) => place.has(node.twin) ? [{ one: place.get(node.twin), other: index, size: 1 }] : []);
  let best = null;
  pairs.forEach((pair, index) => {  // the longest run of pairs in one order on both sides
    for (let i = 0; i < index; i++) {
      if (pairs[i].one < pair.one && pairs[i].size >= pair.size) Object.assign(pair, { size: pairs[i].size + 1, last: pairs[i] });
    }
    if (!best || pair.size > best.size) best = pair;
  });
  const run = [];
  for (let pair = best; pair; pair = pair.last) run.unshift(pair);
  const rows = [[], []];
  let row = 0, from = [0, 0];
  for (const pair of [...run, { one: before.length, other: after.length }]) {
    const to = [pair.one, pair.other], gap = Math.max(to[0] - from[0], to[1] - from[1]);
    rows.forEach((side, which) => {
      for (let index = from[which]; index < to[which]; index++) side.push(row + index - from[which]);
      side.push(row + gap);
    });
    row += gap + 1;
    from = [to[0] + 1, to[1] + 1];
  }
  return rows.map((side, which) => side.slice(0, [before, after][which].length));
}

// Edges go from a shown node to the nearest shown nodes that it is computed from.
function shownInputs(nodes, shown) {
  const byName = new Map(nodes.map(node => [node.name, node])), memo = new Map();
  function nearest(name) {
    if (shown.has(name)) return [name];
    if (memo.has(name)) return memo.get(name);
    memo.set(name, []);
    const node = byName.get(name);
    const found = node ? [...new Set(node.inputs.flatMap(nearest))] : [];
    memo.set(name, found);
    return found;
  }
  const sources = new Map();  // of a shown node: all shown nodes before it
  return node => {
    const near = [...new Set(node.inputs.flatMap(nearest))];
    if (shown.size === nodes.length) return near;
    sources.set(node.name, new Set(near.flatMap(name => [name, ...(sources.get(name) || [])])));
    // Through nodes that are not shown, only what no other edge leads to: not every layer's way along the residual.
    return near.filter(name => node.inputs.includes(name) || !near.some(other => sources.get(other)?.has(name)));
  };
}

function draw(holder, nodes, kept, rows) {
  const byName = new Map(kept.map(node => [node.name, node]));
  const shown = new Map(kept.map((node, index) => [node.name, rows[index]]));
  const inputs = shownInputs(nodes, shown);
  const last = rows.length ? rows[rows.length - 1] : -1;
  const svg = make("svg", { width: 700, height: (last + 1) * ROW + 20, role: "img", "aria-label": "graph" });
  const under = make("g"), edges = make("g"), boxes = make("g");
  svg.append(under, edges, boxes);
  const middle = index => 10 + index * ROW + 12;
  const left = node => LANES[node.kind];

  function edge(from, to, kind) {
    const a = shown.get(from.name), b = shown.get(to.name), y1 = middle(a), y2 = middle(b);
    let path;
    if (left(from) === left(to)) {
      const x = left(from) === LANES.exchange ? left(from) : left(from) + WIDE;
      const bend = (left(from) === LANES.exchange ? -1 : 1) * Math.min(14 + 3 * Math.abs(b - a), 54);
      path = `M${x},${y1} C${x + bend},${y1} ${x + bend},${y2} ${x},${y2}`;
    } else {
      const out = left(from) === LANES.exchange ? left(from) + WIDE : left(from);
      const into = left(to) === LANES.exchange ? left(to) + WIDE : left(to);
      path = `M${out},${y1} C${(out + into) / 2},${y1} ${(out + into) / 2},${y2} ${into},${y2}`;
    }
    const line = make("path", { class: "edge " + kind, d: path });
    line.dataset.from = from.name;
    line.dataset.to = to.name;
    edges.append(line);
  }

  for (const node of kept) {
    const index = shown.get(node.name), y = 10 + index * ROW;
    if (node.op.startsWith("epops.") && node.op.endsWith("_wait")) {
      const start = node.inputs.find(name => name.includes("_start") && shown.has(name));
      if (start) {
        const top = 10 + shown.get(start) * ROW + 24;
        under.append(make("rect", { class: "flight", x: LANES.exchange + 20, y: top, width: 36, height: Math.max(y - top, 0) }));
      }
    }
    for (const name of inputs(node)) edge(byName.get(name), node, "");
    for (const name of node.after) if (shown.has(name)) edge(byName.get(name), node, "order");
    const box = make("g", { class: `node ${node.kind}${node.marked ? " marked" : ""}`, tabindex: 0,
                            transform: `translate(${left(node)},${y})` });
    box.dataset.name = node.name;
    box.append(make("rect", { width: WIDE, height: 24 }));
    const name = short(node.name.replace(/^%/, ""), 26), room = Math.floor((WIDE - 28 - 7.3 * name.length) / 6.7);
    box.append(make("text", { x: 8, y: 16 }, name));
    box.append(make("text", { x: WIDE - 8, y: 16, "text-anchor": "end", class: "shape" }, short(node.shape, room)));
    box.append(make("title", {}, node.text));
    const light = on => {
      for (const line of edges.children) {
        line.classList.toggle("lit", on && (line.dataset.from === node.name || line.dataset.to === node.name));
      }
      if (on) document.getElementById("detail").textContent = node.text;
    };
    box.addEventListener("mouseenter", () => light(true));
    box.addEventListener("mouseleave", () => light(false));
    box.addEventListener("focus", () => light(true));
    box.addEventListener("blur", () => light(false));
    boxes.append(box);
  }
  holder.replaceChildren(svg);
}

function show() {
  const graph = data.graphs[current];
  document.getElementById("facts").replaceChildren(...(graph ? graph.facts : ["no graph was compiled"]).map(fact => {
    const item = document.createElement("li");
    item.textContent = fact;
    return item;
  }));
  [...document.getElementById("tabs").children].forEach((tab, index) => tab.setAttribute("aria-pressed", index === current));
  if (graph) ["before", "after"].forEach((side, index) => {
    document.getElementById(`${side}-heading`).textContent = graph.headings[index];
  });
  const sides = ["before", "after"].map(side => graph ? graph[side] : []), kept = sides.map(nodes => nodes.filter(isShown));
  const rows = level(...kept);
  ["before", "after"].forEach((side, index) => draw(document.getElementById(side), sides[index], kept[index], rows[index]));
  document.body.dataset.ready = "yes";
}

document.getElementById("title").textContent = data.title;
data.graphs.forEach((graph, index) => {
  const tab = document.createElement("button");
  tab.textContent = data.graphs.length > 2 ? `${index + 1}: ${graph.kind}` : graph.kind;
  tab.addEventListener("click", () => { current = index; show(); });
  document.getElementById("tabs").append(tab);
});
document.getElementById("all").addEventListener("change", show);
show();
</script>
</body>
</html>
"""
