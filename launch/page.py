"""The live page of a service: one file, no network beside `/live`, for phones and dark mode too.

`recorded_page` is the same of a run that was recorded: its states stand in the file, and nothing is asked.
"""

import json
from collections.abc import Sequence
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>moe</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #667; --line: #d4d8de; --on: #2a6fc9;
  --off: #e4e8ee; --warn: #b3261e; --second: #c77700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171b; --faint: #9aa3ae; --line: #363c45;
  --on: #6aa9ff; --off: #262b33; --warn: #ff8a80; --second: #ffb74d; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: .2rem 0 .8rem; } h2 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem; margin: 0; }
dl div { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .6rem; }
dt { font-size: .78rem; color: var(--faint); } dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
#ill:not(:empty) { color: var(--warn); border: 1px solid; border-radius: .4rem; padding: .4rem .6rem; }
figure { margin: 0; } figcaption { font-size: .8rem; color: var(--faint); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 11px; }
.heat { display: grid; grid-template-columns: auto 1fr; gap: .1rem .4rem; align-items: stretch; }
canvas { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); box-sizing: border-box; }
.rows, .columns { display: flex; justify-content: space-between; font-size: .75rem; color: var(--faint); }
.rows { flex-direction: column; text-align: right; } .columns { grid-column: 2; max-width: var(--wide); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; vertical-align: -.05em; }
ol { padding-left: 1.3rem; font-size: .85rem; } [hidden] { display: none; }
</style>
<h1>moe <span id="model"></span></h1><p id="ill"></p>
<dl id="figures"></dl>
<h2>Tokens a second</h2><figure><svg id="rate"></svg>
<figcaption>prompt and answer tokens computed, mean of each interval</figcaption></figure>
<h2>Requests</h2><figure><svg id="queue"></svg>
<figcaption><i class="key" style="background:var(--on)"></i>running<i class="key" style="background:var(--second)"></i>
open: running, or waiting for a place</figcaption></figure>
<section id="cache"><h2>Experts in slots</h2>
<figure><div class="heat"><div class="rows" id="layers"></div><canvas id="heat"></canvas>
<div class="columns" id="experts"></div></div>
<figcaption>a row is a layer, a column an expert;<i class="key" style="background:var(--on)"></i>in a slot
<i class="key" style="background:var(--off)"></i>not</figcaption></figure>
<h2>Waiting for reads</h2><figure><svg id="stall"></svg>
<figcaption>share of the time that steps waited for experts to arrive</figcaption></figure></section>
<section id="plan" hidden><h2>Which rank has which expert</h2>
<div id="plans"></div><figcaption id="hosts"></figcaption></section>
<section id="events" hidden><h2>What happened</h2><figure><svg id="line"></svg></figure><ol id="list"></ol></section>
<script>
const recorded = null;
const $ = id => document.getElementById(id), kept = 300, units = ["B", "KiB", "MiB", "GiB", "TiB"];
function bytes(n) {
  let u = 0; while (n >= 1024 && u < 4) { n /= 1024; u++; }
  return n.toFixed(u ? 1 : 0) + " " + units[u];
}
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const atMost = s => s ? "≤ " + (1000 * s).toFixed(0) + " ms" : "–";
const shown = n => n >= 100 || Number.isInteger(n) ? n.toFixed(0) : n.toFixed(1);
function nice(most) {  // the next of 1, 2, 5 times a power of ten
  const p = 10 ** Math.floor(Math.log10(Math.max(most, 1e-9)));
  return [1, 2, 5, 10].map(f => f * p).find(v => v >= most - 1e-12);
}
function el(kind, fields, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const name in fields) made.setAttribute(name, fields[name]);
  if (text !== undefined) made.textContent = text;
  return made;
}
const clock = t => new Date(1000 * t).toLocaleTimeString();
// lines: [color, values]; all over `times`; unit stands behind the numbers of the axis
function chart(id, times, lines, unit, least) {
  const svg = $(id), w = Math.max(280, svg.clientWidth || 900), h = 150, left = 52, right = 10, top = 10, low = h - 22;
  svg.replaceChildren(); svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  const most = nice(Math.max(least, ...lines.flatMap(l => l[1]))), first = times[0], last = times[times.length - 1];
  const x = t => left + (w - left - right) * (last > first ? (t - first) / (last - first) : 1);
  const y = v => low - (low - top) * v / most;
  for (const part of [0, .5, 1]) {
    const v = part * most;
    svg.append(el("line", {x1: left, x2: w - right, y1: y(v), y2: y(v), stroke: color("--line")}),
      el("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, shown(v) + unit));
  }
  const anchors = ["start", "middle", "end"];
  [0, .5, 1].forEach((part, i) => svg.append(el("text", {x: left + (w - left - right) * part, y: h - 6,
    "text-anchor": anchors[i]}, recorded ? clock(first + part * (last - first))
      : i == 2 ? "now" : "−" + Math.round((1 - part) * (last - first)) + " s")));
  for (const [stroke, values] of lines)
    svg.append(el("polyline", {points: values.map((v, i) => x(times[i]).toFixed(1) + "," + y(v).toFixed(1)).join(" "),
      fill: "none", stroke: color(stroke), "stroke-width": 2, "stroke-linejoin": "round"}));
}
function paint(canvas, rows, cell, fill) {
  canvas.style.maxWidth = 30 * Math.max(...rows.map(r => r.length)) + "px";
  canvas.width = cell * Math.max(1, ...rows.map(r => r.length)); canvas.height = cell * Math.max(1, rows.length);
  const pen = canvas.getContext("2d"), gap = cell > 4 ? 1 : 0;
  rows.forEach((row, y) => row.forEach((value, x) => {
    pen.fillStyle = fill(value); pen.fillRect(x * cell, y * cell, cell - gap, cell - gap); }));
}
function labels(id, word, count) {
  const box = $(id); box.textContent = "";
  for (const n of count > 1 ? [0, count - 1] : [0]) {
    const one = document.createElement("span"); one.textContent = (n ? "" : word + " ") + n; box.append(one);
  }
}
const isDark = matchMedia("(prefers-color-scheme: dark)");
const hue = host => `hsl(${(host * 137 + 210) % 360} 60% ${isDark.matches ? 60 : 45}%)`;
let plan = null, formerPlan = null;
function drawPlan(now) {
  $("plan").hidden = !now.plan;
  if (!now.plan) return;
  $("plans").textContent = "";
  for (const [word, one] of [["before", formerPlan], ["now", plan]]) {
    if (!one) continue;
    const title = document.createElement("figcaption"), canvas = document.createElement("canvas");
    title.textContent = word + ": a row is a layer, a column an expert, its colour the rank of its first copy";
    paint(canvas, one, 8, hue); $("plans").append(title, canvas);
  }
  $("hosts").textContent = "ranks, in the order of the hosts below:";
  for (const host of [...new Set([...(formerPlan || []), ...plan].flat())].sort((a, b) => a - b)) {
    const key = document.createElement("i"); key.className = "key"; key.style.background = hue(host);
    $("hosts").append(key, String(host));
  }
}
function drawEvents(now) {
  const events = now.events || []; $("events").hidden = !events.length;
  if (!events.length) return;
  const svg = $("line"), w = Math.max(280, svg.clientWidth || 900), last = now.time;
  const first = Math.min(events[0].time, points[0].time);
  svg.replaceChildren(); svg.setAttribute("viewBox", `0 0 ${w} 46`);
  svg.append(el("line", {x1: 8, x2: w - 8, y1: 14, y2: 14, stroke: color("--line"), "stroke-width": 2}));
  const x = t => 8 + (w - 16) * (last > first ? (t - first) / (last - first) : 0);
  events.forEach(e => {
    const dot = el("circle", {cx: x(e.time), cy: 14, r: 5, fill: color("--second")});
    dot.append(el("title", {}, e.what)); svg.append(dot); });
  svg.append(el("text", {x: 8, y: 38}, clock(first)), el("text", {x: w - 8, y: 38, "text-anchor": "end"}, clock(last)));
  $("list").replaceChildren(...events.slice(-12).map(e => {
    const item = document.createElement("li"); item.textContent = clock(e.time) + ": " + e.what; return item; }));
}
const points = []; let before = null;
function take(now) {
  const old = before && before.tokens <= now.tokens ? before : now;  // else it was started again
  const seconds = Math.max(now.time - old.time, 1e-9);
  const per = key => (now[key] - old[key]) / seconds;
  if (now.plan && JSON.stringify(now.plan) !== JSON.stringify(plan)) { formerPlan = plan; plan = now.plan; }
  points.push({time: now.time, rate: before ? per("tokens") : 0, open: now.open, running: now.running,
    stall: before ? Math.min(100, 100 * per("stall_seconds")) : 0, read: per("bytes_read"),
    hits: now.hits - old.hits, misses: now.misses - old.misses});
  if (points.length > kept && !recorded) points.shift();
  before = now;
}
function draw() {
  const now = before, p = points[points.length - 1], column = key => points.map(one => one[key]);
  const share = recorded ? [now.hits, now.misses] : [p.hits, p.misses], all = share[0] + share[1];
  const run = recorded && recorded.length > 1 ? now.time - recorded[0].time : 0;  // of a whole run: means
  const mean = (key, last) => run > 0 ? (now[key] - recorded[0][key]) / run : last;
  const figures = [["tokens/s", mean("tokens", p.rate).toFixed(1)], ["requests open", now.open],
    ["running / waiting for a place", now.running + " / " + now.waiting],
    ["KV blocks in use", (now.blocks - now.free_blocks) + " of " + now.blocks],
    ["first token, median", atMost(now.first_token_p50)], ["between tokens, 99\\u00a0%", atMost(now.token_p99)]];
  if (now.experts) figures.push(now.slots > now.experts ? ["slots for " + now.experts + " experts", now.slots]
    : ["experts in slots", now.slots + " of " + now.experts]);
  if (now.hits + now.misses) figures.push(["found in a slot", all ? (100 * share[0] / all).toFixed(1) + " %" : "–"],
    ["read", bytes(mean("bytes_read", p.read)) + "/s"]);  // hosts count their own
  if (now.planned_rate) figures.push(["decoding, tokens/s", now.decode_rate.toFixed(1)],
    ["planned (" + now.planned_binds + " binds)", now.planned_rate.toFixed(1)]);
  const since = recorded ? ", recorded " + new Date(1000 * points[0].time).toLocaleString() : "";
  $("model").textContent = now.model + since;
  $("ill").textContent = now.ill || "";
  $("figures").replaceChildren(...figures.map(([name, value]) => {
    const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = value; box.append(dt, dd); return box; }));
  chart("rate", column("time"), [["--on", column("rate")]], "", 1);
  chart("queue", column("time"), [["--second", column("open")], ["--on", column("running")]], "", 2);
  $("cache").hidden = !now.heat.length;
  if (now.heat.length) {
    chart("stall", column("time"), [["--on", column("stall")]], " %", 1);
    const wide = Math.max(...now.heat.map(r => r.length)), on = color("--on"), off = color("--off");
    paint($("heat"), now.heat, wide > 128 ? 4 : 10, value => value ? on : off);
    $("experts").style.setProperty("--wide", 30 * wide + "px");
    labels("layers", "layer", now.heat.length); labels("experts", "expert", wide);
  }
  drawPlan(now); drawEvents(now);
}
async function step() {
  const key = decodeURIComponent(location.hash.slice(1));  // what follows # is sent to nobody
  let why = "the service does not answer";
  try {
    const answer = await fetch("live", key ? {headers: {Authorization: "Bearer " + key}} : {});
    if (answer.status === 401) why = "the service asks for its key: put it behind the address of this page, #KEY";
    if (!answer.ok) throw answer;
    take(await answer.json()); draw();
  } catch (error) { $("ill").textContent = why; }
  setTimeout(step, 1000);
}
addEventListener("resize", () => before && draw());
isDark.addEventListener("change", () => before && draw());
if (recorded) { recorded.forEach(take); draw(); } else step();
</script></html>
"""


def recorded_page(states: Sequence[dict[str, Any]]) -> str:
    """The page of a run: the states that `live_state` gave, oldest first. Raises ValueError if there are none."""
    if not states:
        raise ValueError("the recording has no state")
    inside = json.dumps(states).replace("</", "<\\/")
    return PAGE.replace("const recorded = null;", f"const recorded = {inside};")
