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
  const [y0, y1] = [log(y.low), log(y.high)];
  const px = at => m.left + (at - x.low) / (x.high - x.low || 1) * (width - m.left - m.right);
  const py = at => height - m.bottom - (log(at) - y0) / (y1 - y0 || 1) * (height - m.top - m.bottom);
  const parts = [];
  for (const at of ticks) {
    parts.push(`<line class="grid" x1="${m.left}" x2="${width - m.right}" y1="${py(at)}" y2="${py(at)}"/>`,
      `<text x="${m.left - 7}" y="${py(at) + 4}" text-anchor="end">${format(at)}</text>`);
  }
  for (const at of x.hidden ? [] : steps(x.low, x.high, (width - m.left) / 90)) {
    parts.push(`<text x="${px(at)}" y="${height - m.bottom + 17}" text-anchor="middle">${(x.format || short)(at)}</text>`);
  }
  parts.push(`<text class="soft" x="${(m.left + width - m.right) / 2}" y="${height - 5}" text-anchor="middle">${escaped(x.title)}</text>`,
    `<text class="soft" transform="translate(12 ${(m.top + height - m.bottom) / 2}) rotate(-90)" text-anchor="middle">${escaped(y.title)}</text>`);
  return { px, py, parts, m, back: at => x.low + (at - m.left) / (width - m.left - m.right) * (x.high - x.low) };
}

const legend = items => `<div class="legend">${items.map(([name, colour, ring]) =>
  `<span><i ${ring ? `class="ring" style="color:${colour}"` : `style="background:${colour}"`}></i>${escaped(name)}</span>`).join("")}</div>`;
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
    const top = Math.max(data.reserved || 0, ...at.map(total)) * 1.04;
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

  /* data: {series: [{name, points: [[x, y]], dots}], x, y, unit}: curves over updates. */
  lines(box, data, width) {
    const height = width < 600 ? 240 : 300, every = data.series.flatMap(one => one.points);
    const xs = every.map(one => one[0]), ys = every.map(one => one[1]), scale = data.unit === "GiB" ? GIB : 1;
    const low = data.zero ? 0 : Math.min(...ys), high = Math.max(...ys), room = (high - low || Math.abs(high) || 1) * 0.05;
    const format = one => short(one / scale), bottom = data.zero ? 0 : low - room;
    const plot = axes(width, height, { low: Math.min(...xs), high: Math.max(...xs), title: data.x },
      { low: bottom, high: high + room, format, title: data.y,
        ticks: steps(bottom / scale, (high + room) / scale, height / 60).map(one => one * scale) });
    const { px, py, m, parts } = plot;
    data.series.forEach((one, i) => {
      const colour = one.colour || PALETTE[i % PALETTE.length], points = one.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`);
      if (points.length > 1) parts.push(`<polyline fill="none" stroke="${colour}" stroke-width="1.8" ${one.dashed ? `stroke-dasharray="5 4"` : ""} points="${points.join(" ")}"/>`);
      if (one.dots || points.length === 1) one.points.forEach(([x, y]) => parts.push(`<circle cx="${px(x)}" cy="${py(y)}" r="4" fill="${colour}"/>`));
    });
    parts.push(`<line class="cursor" visibility="hidden" y1="${m.top}" y2="${height - m.bottom}" stroke="var(--soft)"/>`);
    const keys = data.series.map((one, i) => [one.name, one.colour || PALETTE[i % PALETTE.length]]);
    box.innerHTML = (keys.length > 1 ? legend(keys) : "") + svg(width, height, parts) + `<div class="tip"></div>`;
    const cursor = box.querySelector(".cursor"), near = at => one => one.points.reduce((a, b) =>
      Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const show = at => {
      const found = data.series.map(near(at)), place = found.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)[0];
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(place));
      box.querySelector(".tip").textContent = `${data.x} ${place}: ` + found.map(([x, y], i) =>
        `${data.series[i].name} ${scale === GIB ? bytes(y) : short(y)}${x === place ? "" : ` (at ${x})`}`).join(" · ");
    };
    follow(box, width, x => { cursor.setAttribute("visibility", "visible"); show(plot.back(x)); });
    show(Math.max(...xs));
  },

  /* data: [{name, x, y, low, high, best, exact, text}]: x bytes, y perplexity. */
  scatter(box, data, width) {
    const height = width < 600 ? 340 : 440, xs = data.map(one => one.x), ys = data.flatMap(one => [one.low, one.high, one.y]);
    const room = (Math.max(...xs) - Math.min(...xs) || Math.max(...xs)) * 0.06;
    const log = Math.max(...ys) > 2 * Math.min(...ys), spread = (Math.max(...ys) - Math.min(...ys) || Math.max(...ys)) * 0.1;
    const low = log ? Math.min(...ys) * 0.92 : Math.min(...ys) - spread, high = log ? Math.max(...ys) * 1.08 : Math.max(...ys) + spread;
    const decades = [1, 10, 100, 1e3, 1e4, 1e5].flatMap(power => [1, 1.5, 2, 3, 4, 5, 7].map(one => one * power));
    const ticks = high < 5 * low ? steps(low, high, height / 60) : decades.filter(one => low <= one && one <= high);
    const plot = axes(width, height, { low: Math.min(...xs) - room, high: Math.max(...xs) + room, title: "memory of the process, GiB", hidden: true },
      { low, high, log, ticks, title: log ? "perplexity, log scale" : "perplexity" }, { right: 20 });
    const { px, py, m, parts } = plot;
    for (const at of steps((Math.min(...xs) - room) / GIB, (Math.max(...xs) + room) / GIB, (width - m.left) / 90)) {
      parts.push(`<text x="${px(at * GIB)}" y="${height - m.bottom + 17}" text-anchor="middle">${short(at)}</text>`);
    }
    const front = data.filter(one => one.best).sort((a, b) => a.x - b.x).map(one => `${px(one.x)},${py(one.y)}`);
    parts.push(`<polyline fill="none" stroke="${MARK}" stroke-width="1.5" points="${front.join(" ")}"/>`);
    const taken = data.map(one => [px(one.x) - 7, py(one.y) - 7, px(one.x) + 7, py(one.y) + 7]);
    const free = (x, y, w) => x >= m.left && x + w <= width - 2 && y - 11 >= 2 && y <= height - m.bottom
      && !taken.some(([a, b, c, d]) => x < c && x + w > a && y - 11 < d && y + 2 > b);
    [...data].map((one, i) => [one, i]).sort((a, b) => b[0].best - a[0].best).forEach(([one, i]) => {
      const colour = one.best ? MARK : "var(--soft)", x = px(one.x), y = py(one.y);
      if (one.high > one.low) parts.push(`<line x1="${x}" x2="${x}" y1="${py(one.low)}" y2="${py(one.high)}" stroke="${colour}" opacity=".6"/>`);
      parts.push(one.exact ? `<circle data-i="${i}" cx="${x}" cy="${y}" r="6" fill="${colour}"/>`
        : `<rect data-i="${i}" x="${x - 5}" y="${y - 5}" width="10" height="10" fill="var(--paper)" stroke="${colour}" stroke-width="2"/>`);
      const w = one.name.length * 6.7, places = [[x + 9, y - 6], [x + 9, y + 14], [x - 9 - w, y - 6], [x - 9 - w, y + 14], [x - w / 2, y - 12], [x - w / 2, y + 22]];
      const place = places.find(([a, b]) => free(a, b, w));
      if (!place) return;  // pointing at it still names it
      taken.push([place[0], place[1] - 11, place[0] + w, place[1] + 2]);
      parts.push(`<text x="${place[0]}" y="${place[1]}"${one.best ? "" : ` class="soft"`}>${escaped(one.name)}</text>`);
    });
    box.innerHTML = legend([["on the Pareto front", MARK], ["behind it", "var(--soft)"]]) + svg(width, height, parts)
      + `<div class="tip">A disc is published, a square interpolated. Point at one.</div>`;
    const nearest = (x, y) => data.reduce((a, b) => Math.hypot(px(b.x) - x, py(b.y) - y) < Math.hypot(px(a.x) - x, py(a.y) - y) ? b : a);
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
