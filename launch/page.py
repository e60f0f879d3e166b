"""The live page of a service: one file, no network beside `/live`, for phones and dark mode too."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>moe</title>
<style>
:root { color-scheme: light dark; --line: #8885; --on: #2a7fd4; --off: #8883; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin-bottom: .3rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem; }
dl div { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }
dt { font-size: .8rem; opacity: .75; } dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
#ill { color: #c33; } canvas { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption, p.note { font-size: .8rem; opacity: .75; } figure { margin: 0; }
</style>
<h1>moe <span id="model"></span></h1><p id="ill"></p>
<dl id="figures"></dl>
<h2>Tokens a second</h2>
<figure><canvas id="rate" width="600" height="80"></canvas>
<figcaption>last 120 s; the top of the picture is <span id="most">0</span> tokens/s</figcaption></figure>
<h2>Experts in slots</h2>
<figure><canvas id="heat"></canvas>
<figcaption>one row a layer, from the first at the top; one column an expert; filled: in a slot now</figcaption>
</figure>
<script>
const units = ["B", "KiB", "MiB", "GiB", "TiB"];
function bytes(n) {
  let u = 0; while (n >= 1024 && u < 4) { n /= 1024; u++; }
  return n.toFixed(u ? 1 : 0) + " " + units[u];
}
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name);
let before = null; const rates = [];
function show(now) {
  const old = before || now, seconds = Math.max(now.time - old.time, 1e-9);
  const rate = before ? (now.tokens - old.tokens) / seconds : 0;
  rates.push(rate); if (rates.length > 120) rates.shift();
  const hits = now.hits - old.hits, misses = now.misses - old.misses;
  const figures = [
    ["tokens/s", rate.toFixed(1)], ["requests open", now.open],
    ["running / waiting", now.running + " / " + now.waiting],
    ["KV blocks in use", (now.blocks - now.free_blocks) + " of " + now.blocks],
    ["experts in slots", now.slots + " of " + now.experts],
    ["hits, now", hits + misses ? (100 * hits / (hits + misses)).toFixed(1) + " %" : "–"],
    ["read", bytes((now.bytes_read - old.bytes_read) / seconds) + "/s"],
    ["waiting for reads", (100 * (now.stall_seconds - old.stall_seconds) / seconds).toFixed(1) + " % of the time"],
    ["first token, median", "≤ " + (1000 * now.first_token_p50).toFixed(0) + " ms"],
    ["between tokens, 99 %", "≤ " + (1000 * now.token_p99).toFixed(0) + " ms"]];
  document.getElementById("model").textContent = now.model;
  document.getElementById("ill").textContent = now.ill || "";
  const list = document.getElementById("figures"); list.textContent = "";
  for (const [name, value] of figures) {
    const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = value; box.append(dt, dd); list.append(box);
  }
  const most = Math.max(1, ...rates), canvas = document.getElementById("rate"), pen = canvas.getContext("2d");
  document.getElementById("most").textContent = most.toFixed(0);
  pen.clearRect(0, 0, 600, 80); pen.fillStyle = style("--on");
  rates.forEach((r, i) => pen.fillRect(i * 5, 80 - 80 * r / most, 4, 80 * r / most));
  const heat = document.getElementById("heat"), cell = 6, rows = now.heat;
  heat.width = cell * Math.max(1, ...rows.map(r => r.length)); heat.height = cell * Math.max(1, rows.length);
  const paint = heat.getContext("2d");
  rows.forEach((row, y) => row.forEach((on, x) => {
    paint.fillStyle = style(on ? "--on" : "--off"); paint.fillRect(x * cell, y * cell, cell - 1, cell - 1); }));
  before = now;
}
async function step() {
  try { show(await (await fetch("live")).json()); }
  catch (error) { document.getElementById("ill").textContent = "the service does not answer"; }
  setTimeout(step, 1000);
}
step();
</script></html>
"""
