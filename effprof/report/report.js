"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const GIB = 2 ** 30, MARK = "var(--main)";
const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"];
const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const sum = list => list.reduce((total, one) => total + one, 0);
const bytes = size => Math.abs(size) >= GIB / 10 ? `${(size / GIB).toFixed(2)} GiB`
  : Math.abs(size) >= 2 ** 20 / 10 ? `${(size / 2 ** 20).toFixed(1)} MiB`
  : size ? `${(size / 1024).toFixed(1)} KiB` : "0";
const short = value => {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)} B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)} M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)} k`;
  return size && size < 1e-3 ? value.toExponential(1).replace("e-", "e−") : String(+value.toPrecision(4));
};

/* Round steps of 1, 2 or 5 from low to high, about `wanted` of them. */
function steps(low, high, wanted) {
  const raw = (high - low || Math.abs(high) || 1) / Math.max(wanted, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(one => one * power >= raw * 0.999) * power, found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(+at.toPrecision(12));
  return found;
}

/* A plotting area: its scales, gridlines, tick labels and axis titles. */
function axes(width, height, x, y, margin) {
  const ticks = y.ticks || steps(y.low, y.high, height / 60), format = y.format || short;
  const wide = Math.max(...ticks.map(at => format(at).length), 1) * 6.8;
  const m = { left: 32 + wide, right: 14, top: 14, bottom: 42, ...margin }, log = y.log ? Math.log : one => one;
  const [y0, y1] = [log(y.low), log(y.high)], flat = x.log ? Math.log : one => one, long = width - m.left - m.right;
  const [x0, x1] = [flat(x.low), flat(x.high)];
  const px = at => m.left + (flat(at) - x0) / (x1 - x0 || 1) * long;
  const py = at => height - m.bottom - (log(at) - y0) / (y1 - y0 || 1) * (height - m.top - m.bottom);
  const parts = [];
  for (const at of ticks) {
    parts.push(`<line class="grid" x1="${m.left}" x2="${width - m.right}" y1="${py(at)}" y2="${py(at)}"/>`,
      `<text x="${m.left - 7}" y="${py(at) + 4}" text-anchor="end">${format(at)}</text>`);
  }
  for (const at of x.hidden ? [] : x.ticks || steps(x.low, x.high, (width - m.left) / 90)) {
    parts.push(`<text x="${px(at)}" y="${height - m.bottom + 17}" text-anchor="middle">${(x.format || short)(at)}</text>`);
  }
  parts.push(`<text class="soft" x="${(m.left + width - m.right) / 2}" y="${height - 5}" text-anchor="middle">${escaped(x.title)}</text>`,
    `<text class="soft" transform="translate(12 ${(m.top + height - m.bottom) / 2}) rotate(-90)" text-anchor="middle">${escaped(y.title)}</text>`);
  const back = at => x0 + (at - m.left) / long * (x1 - x0);
  return { px, py, parts, m, back: at => x.log ? Math.exp(back(at)) : back(at) };
}

/* Round numbers between low and high of a logarithmic axis, about `wanted` of them. */
function decades(low, high, wanted) {
  if (high < 2 * low) return steps(low, high, wanted);
  const found = (digits) => {
    const list = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) list.push(...digits.map(one => +(one * 10 ** power).toPrecision(6)));
    return list.filter(one => low <= one && one <= high);
  };
  return [[1, 1.5, 2, 3, 4, 5, 7], [1, 2, 5], [1, 3], [1]].map(found).find(list => list.length <= wanted) || found([1]);
}

/* Items are [name, colour, ring, dash]: a square, a ring, or a piece of a dashed line. */
const legend = items => `<div class="legend">${items.map(([name, colour, ring, dash]) => {
  let end = 0;
  const pieces = (dash || "").split(" ").map((long, i) => `${i % 2 ? "transparent" : colour} ${end}px ${end += +long}px`);
  const drawn = dash ? ` class="dash" style="background:repeating-linear-gradient(90deg, ${pieces.join(", ")})"`
    : ring ? ` class="ring" style="color:${colour}"` : ` style="background:${colour}"`;
  return `<span><i${drawn}></i>${escaped(name)}</span>`;
}).join("")}</div>`;
const svg = (width, height, parts) => `<svg height="${height}" viewBox="0 0 ${width} ${height}">${parts.join("")}</svg>`;
const rows = list => `<table>${list.map(one => `<tr>${one.map(cell => `<td>${cell}</td>`).join("")}</tr>`).join("")}</table>`;

/* Follow a pointer or a finger over a drawing: `show` has its x in the drawing's own units. */
function follow(box, width, show) {
  const drawing = box.querySelector("svg");
  drawing.addEventListener("pointermove", event => {
    const frame = drawing.getBoundingClientRect();
    show((event.clientX - frame.left) / frame.width * width, (event.clientY - frame.top), event.target);
  });
}

const charts = {
  timeline(box, data, width) {
    const at = data.instants, height = width < 600 ? 300 : 400, total = one => sum(one[1]);
    const first = at[0][0], last = Math.max(at[at.length - 1][0], first + 1);
    const top = Math.max(data.top || 0, data.reserved || 0, ...at.map(total)) * 1.04;
    const small = top < GIB / 2, unit = small ? 2 ** 20 : GIB;
    const plot = axes(width, height, { low: first, high: last, hidden: true, title: "allocations and frees, in order" },
      { low: 0, high: top, ticks: steps(0, top / unit, height / 60).map(one => one * unit),
        format: one => short(one / unit), title: small ? "MiB" : "GiB" }, { top: 24, bottom: 24 });
    const { px, py, m, parts } = plot, used = data.roles.map((_, r) => at.some(one => one[1][r] > 0));
    data.spans.forEach(([phase, start, end], i) => {
      const from = px(start), to = px(Math.min(end, last));
      if (i % 2) parts.push(`<rect x="${from}" y="${m.top}" width="${Math.max(to - from, 0)}" height="${height - m.bottom - m.top}" fill="var(--shade)"/>`);
      if (to - from > phase.length * 6.6 + 4) parts.push(`<text x="${(from + to) / 2}" y="${m.top - 8}" text-anchor="middle">${escaped(phase)}</text>`);
    });
    let below = at.map(() => 0);
    data.roles.forEach((role, r) => {
      const above = at.map((one, i) => below[i] + one[1][r]);
      const line = at.map((one, i) => `${px(one[0]).toFixed(1)},${py(above[i]).toFixed(1)}`);
      const back = at.map((one, i) => `${px(one[0]).toFixed(1)},${py(below[i]).toFixed(1)}`).reverse();
      if (used[r]) parts.push(`<polygon points="${line.concat(back).join(" ")}" fill="${page.colours[role]}"/>`);
      below = above;
    });
    if (data.reserved) parts.push(`<line x1="${m.left}" x2="${width - m.right}" y1="${py(data.reserved)}" y2="${py(data.reserved)}" stroke="var(--ink)" stroke-dasharray="5 4"/>`);
    const best = at.reduce((a, b) => total(b) > total(a) ? b : a);
    parts.push(`<line class="cursor" y1="${m.top}" y2="${height - m.bottom}" stroke="var(--ink)"/>`,
      `<circle cx="${px(best[0])}" cy="${py(total(best))}" r="4" fill="var(--ink)" stroke="var(--paper)" stroke-width="1.5"/>`);
    const keys = data.roles.map((role, r) => [role, page.colours[role], false]).filter((_, r) => used[r]);
    keys.push(["peak", "var(--ink)", true]);
    box.innerHTML = legend(keys) + svg(width, height, parts) + `<div class="tip"></div>`
      + (data.reserved ? `<p class="note">The dashed line is reserved memory, ${bytes(data.reserved)}.</p>` : "");
    const tip = box.querySelector(".tip"), cursor = box.querySelector(".cursor");
    const show = one => {
      const span = data.spans.find(s => s[1] <= one[0] && one[0] < s[2]), roles = [];
      data.roles.forEach((role, r) => { if (used[r]) roles.push([bytes(one[1][r]), role]); });
      const names = one[2].map(([size, label]) => [bytes(size), `${escaped(data.labels[label][1])} <span class="note">${data.labels[label][0]}</span>`]);
      tip.innerHTML = `<b>${bytes(total(one))}</b> at event ${one[0]}${span ? ` · ${escaped(span[0])}` : ""}`
        + `<div class="halves">${rows(roles)}${rows(names)}</div>`;
      cursor.setAttribute("x1", px(one[0])); cursor.setAttribute("x2", px(one[0]));
    };
    follow(box, width, x => { const event = plot.back(x); show(at.reduce((a, b) => Math.abs(b[0] - event) < Math.abs(a[0] - event) ? b : a)); });
    show(best);
  },

  /* data: {rows: [{name, parts: [[part, bytes]], mark}], colours}: horizontal stacks of bytes. */
  bars(box, data, width) {
    const top = Math.max(...data.rows.map(row => sum(row.parts.map(part => part[1])))) || 1;
    const wide = Math.min(Math.max(...data.rows.map(row => row.name.length)) * 7 + 10, width * 0.4), end = 76;
    const step = data.rows.length > 6 ? 24 : 34, height = data.rows.length * step + 6, parts = [], colours = {};
    data.rows.forEach((row, i) => {
      let from = wide;
      const y = i * step + 3;
      parts.push(`<text x="${wide - 8}" y="${y + step / 2 + 1}" text-anchor="end">${escaped(row.name)}</text>`);
      row.parts.forEach(([part, size]) => {
        const long = size / top * (width - wide - end);
        const colour = page.colours[part] || data.colours[part];
        if (size > 0) colours[part] = colour;
        if (long > 0) parts.push(`<rect x="${from}" y="${y}" width="${long}" height="${step - 8}" fill="${colour}" data-tip="${escaped(`${row.name}: ${part} ${bytes(size)}`)}"/>`);
        from += long;
      });
      parts.push(`<text x="${from + 7}" y="${y + step / 2 + 1}">${bytes(sum(row.parts.map(part => part[1])))}</text>`);
    });
    box.innerHTML = legend(Object.entries(colours)) + svg(width, height, parts) + `<div class="tip">Point at a part for its size.</div>`;
    follow(box, width, (x, y, target) => { if (target.dataset.tip) box.querySelector(".tip").textContent = target.dataset.tip; });
  },

  /* data: {series: [{name, points: [[x, y]], dots, lost: [x]}], x, y, unit, log, low, high}: curves over updates;
     `log` makes both axes logarithmic, `lost` are crosses where a run diverged. */
  lines(box, data, width) {
    const height = width < 600 ? 260 : data.series.length > 6 ? 400 : 300, every = data.series.flatMap(one => one.points);
    const xs = data.series.flatMap(one => [...one.points.map(point => point[0]), ...(one.lost || [])]), ys = every.map(one => one[1]);
    const scale = data.unit === "GiB" ? GIB : 1, low = data.zero ? 0 : Math.min(...ys), high = data.high || Math.max(...ys);
    const room = data.log ? 0 : (high - low || Math.abs(high) || 1) * 0.05, format = one => short(one / scale);
    const bottom = data.log ? low / 1.06 : data.zero ? 0 : low - room, top = data.log ? high * 1.06 : high + room;
    const [first, last] = [Math.min(...xs), Math.max(...xs)], wide = data.log ? 1.15 : 1;
    const plot = axes(width, height,
      { low: first / wide, high: last * wide, log: data.log, title: data.x, ticks: data.log && decades(first / wide, last * wide, width / 60) },
      { low: bottom, high: top, log: data.log, format, title: data.y, ticks: data.log ? decades(bottom, top, height / 30)
        : steps(bottom / scale, top / scale, height / 60).map(one => one * scale) });
    const { px, py, m, parts } = plot, many = data.series.length > 4;
    const colour = i => data.series[i].colour || PALETTE[i % PALETTE.length];
    const dash = i => data.series[i].dashed ? "5 4" : ["", "6 3", "2 3", "9 3 2 3"][Math.floor(i / PALETTE.length) % 4];
    data.series.forEach((one, i) => {
      const points = one.points.filter(([, y]) => y <= top).map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`);
      parts.push(`<g data-series="${i}">`);
      if (points.length > 1) parts.push(`<polyline fill="none" stroke="${colour(i)}" stroke-width="1.8" stroke-dasharray="${dash(i)}" points="${points.join(" ")}"/>`);
      if (one.dots || points.length === 1) one.points.forEach(([x, y]) => parts.push(`<circle cx="${px(x)}" cy="${py(y)}" r="${many ? 3 : 4}" fill="${colour(i)}"/>`));
      (one.lost || []).forEach(x => parts.push(`<path d="M${px(x) - 4} ${m.top - 2}l8 8m0 -8l-8 8" stroke="${colour(i)}" stroke-width="1.8"/>`));
      parts.push("</g>");
    });
    parts.push(`<line class="cursor" visibility="hidden" y1="${m.top}" y2="${height - m.bottom}" stroke="var(--soft)"/>`);
    const keys = data.series.map((one, i) => [one.name, colour(i), false, dash(i)]);
    box.innerHTML = (keys.length > 1 ? legend(keys) : "") + svg(width, height, parts) + `<div class="tip"></div>`;
    const cursor = box.querySelector(".cursor"), tip = box.querySelector(".tip");
    const near = at => one => one.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const mark = place => {
      cursor.setAttribute("visibility", "visible");
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(place));
    };
    const together = at => {
      const found = data.series.map(near(at)), place = found.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)[0];
      mark(place);
      tip.textContent = `${data.x} ${short(place)}: ` + found.map(([x, y], i) =>
        `${data.series[i].name} ${scale === GIB ? bytes(y) : short(y)}${x === place ? "" : ` (at ${short(x)})`}`).join(" · ");
    };
    const alone = chosen => {
      box.querySelectorAll("[data-series]").forEach(one => { one.style.opacity = chosen === undefined || +one.dataset.series === chosen ? 1 : 0.2; });
      box.querySelectorAll(".legend span").forEach((one, i) => one.classList.toggle("chosen", i === chosen));
    };
    const closest = (x, y) => {
      const found = data.series.map((one, i) => {
        const point = one.points.reduce((a, b) => Math.abs(px(b[0]) - x) < Math.abs(px(a[0]) - x) ? b : a);
        return [Math.hypot(px(point[0]) - x, py(point[1]) - y), i, point];
      }).reduce((a, b) => b[0] < a[0] ? b : a);
      alone(found[1]);
      mark(found[2][0]);
      tip.textContent = `${data.series[found[1]].name}: ${data.y.split(",")[0]} ${short(found[2][1])} at ${data.x.split(",")[0]} ${short(found[2][0])}`;
    };
    follow(box, width, (x, y) => many ? closest(x, y) : together(plot.back(x)));
    if (!many) { together(last); cursor.setAttribute("visibility", "hidden"); return; }
    tip.textContent = "Point at a curve, or at a name, for its numbers.";
    box.querySelectorAll(".legend span").forEach((one, i) => one.addEventListener("pointerenter", () => {
      const point = data.series[i].points[data.series[i].points.length - 1];
      closest(px(point[0]), py(point[1])), alone(i);
      tip.textContent = `${data.series[i].name}: ${data.y.split(",")[0]} ${short(point[1])} at ${data.x.split(",")[0]} ${short(point[0])}`;
    }));
    box.addEventListener("pointerleave", () => { alone(); cursor.setAttribute("visibility", "hidden"); });
  },

  /* data: {points: [{name, x, y, low, high, best, exact, text, size}], x, y, unit, log, limit, best, rest, note}:
     x over unit against y; `limit` is a line that x may not cross, `size` makes a disc's area. */
  scatter(box, data, width) {
    const { points, unit } = data, height = width < 600 ? 340 : 440, ys = points.flatMap(one => [one.low, one.high, one.y]);
    const xs = [...points.map(one => one.x), ...(data.limit ? [data.limit] : [])], [least, most] = [Math.min(...xs), Math.max(...xs)];
    const room = Math.max((most - least) * 0.06, most * 0.05), far = data.log && most > 4 * least;
    const [left, right] = far ? [least / 1.15, most * 1.15] : [Math.max(least - room, 0), most + room];
    const log = Math.max(...ys) > 2 * Math.min(...ys), spread = (Math.max(...ys) - Math.min(...ys) || Math.max(...ys)) * 0.1;
    const low = log ? Math.min(...ys) * 0.92 : Math.min(...ys) - spread, high = log ? Math.max(...ys) * 1.08 : Math.max(...ys) + spread;
    const ticks = log ? decades(low, high, height / 30) : steps(low, high, height / 60), wanted = (width - 60) / 90;
    const across = (far ? decades(left / unit, right / unit, wanted) : steps(left / unit, right / unit, wanted)).map(one => one * unit);
    const plot = axes(width, height, { low: left, high: right, log: far, title: data.x + (far ? ", log scale" : ""), ticks: across, format: one => short(one / unit) },
      { low, high, log, ticks, title: data.y + (log ? ", log scale" : "") }, { right: 20 });
    const { px, py, m, parts } = plot, big = Math.max(...points.map(one => one.size || 0)), sizes = one => one.size ? 5 + 9 * Math.sqrt(one.size / big) : 6;
    if (data.limit) {
      const x = px(data.limit);
      parts.push(`<rect x="${x}" y="${m.top}" width="${Math.max(width - m.right - x, 0)}" height="${height - m.bottom - m.top}" fill="var(--shade)"/>`,
        `<line x1="${x}" x2="${x}" y1="${m.top}" y2="${height - m.bottom}" stroke="var(--bad)" stroke-dasharray="5 4"/>`);
    }
    const front = points.filter(one => one.best).sort((a, b) => a.x - b.x).map(one => `${px(one.x)},${py(one.y)}`);
    parts.push(`<polyline fill="none" stroke="${MARK}" stroke-width="1.5" points="${front.join(" ")}"/>`);
    const taken = points.map(one => [px(one.x) - sizes(one) - 1, py(one.y) - sizes(one) - 1, px(one.x) + sizes(one) + 1, py(one.y) + sizes(one) + 1]);
    const free = (x, y, w) => x >= m.left && x + w <= width - 2 && y - 11 >= 2 && y <= height - m.bottom
      && !taken.some(([a, b, c, d]) => x < c && x + w > a && y - 11 < d && y + 2 > b);
    [...points].map((one, i) => [one, i]).sort((a, b) => b[0].best - a[0].best).forEach(([one, i]) => {
      const colour = one.best ? MARK : "var(--soft)", x = px(one.x), y = py(one.y), r = sizes(one);
      if (one.high > one.low) parts.push(`<line x1="${x}" x2="${x}" y1="${py(one.low)}" y2="${py(one.high)}" stroke="${colour}" opacity=".6"/>`);
      parts.push(one.exact ? `<circle data-i="${i}" cx="${x}" cy="${y}" r="${r}" fill="${colour}"${one.size ? ` fill-opacity=".55" stroke="${colour}"` : ""}/>`
        : `<rect data-i="${i}" x="${x - r + 1}" y="${y - r + 1}" width="${2 * r - 2}" height="${2 * r - 2}" fill="var(--paper)" fill-opacity=".5" stroke="${colour}" stroke-width="2"/>`);
      const w = one.name.length * 6.7, aside = r + 3;
      const places = [[x + aside, y - 6], [x + aside, y + 14], [x - aside - w, y - 6], [x - aside - w, y + 14], [x - w / 2, y - r - 6], [x - w / 2, y + r + 16]];
      const away = (other, a, b) => Math.hypot(Math.max(a - px(other.x), px(other.x) - a - w, 0), Math.max(b - 11 - py(other.y), py(other.y) - b - 2, 0));
      const own = ([a, b]) => points.every(other => other === one || away(other, a, b) > away(one, a, b));
      const place = places.find(([a, b]) => free(a, b, w) && own([a, b]));
      if (!place) return;  // pointing at it still names it
      taken.push([place[0], place[1] - 11, place[0] + w, place[1] + 2]);
      parts.push(`<text x="${place[0]}" y="${place[1]}"${one.best ? "" : ` class="soft"`}>${escaped(one.name)}</text>`);
    });
    const keys = [[data.best || "on the Pareto front", MARK]];
    if (points.some(one => !one.best)) keys.push([data.rest || "behind it", "var(--soft)"]);
    if (data.limit) keys.push([data.limited, "var(--bad)"]);
    box.innerHTML = legend(keys) + svg(width, height, parts) + `<div class="tip">${escaped(data.note)}</div>`;
    const nearest = (x, y) => points.reduce((a, b) => Math.hypot(px(b.x) - x, py(b.y) - y) < Math.hypot(px(a.x) - x, py(a.y) - y) ? b : a);
    follow(box, width, (x, y) => { box.querySelector(".tip").textContent = nearest(x, y).text; });
  },
};

const boxes = [...document.querySelectorAll("[data-chart]")];
const draw = () => boxes.forEach(box => {
  const { kind, data } = page.charts[box.dataset.chart];
  charts[kind](box, data, box.clientWidth);
});
let drawn = 0;
addEventListener("resize", () => { if (drawn !== innerWidth) { drawn = innerWidth; draw(); } });
drawn = innerWidth;
draw();

for (const one of document.querySelectorAll(".typed")) {
  const [text, button] = one.children;
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text);
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
    catch { button.textContent = "Selected"; }  // a browser that lets no page write: Ctrl-C takes it
  });
}
