// A trial in the table and in all charts at once: filtered, marked as one of the best or pinned, or pointed at.
"use strict";
const openTrials = (root, config) => {
  const told = JSON.parse(root.querySelector("script").textContent);
  const trials = new Map(told.map(([number, family, rank, ending, value]) => [number, { number, family, rank, ending, value }]));
  const table = document.querySelector("tr[data-trial]").closest("table");
  const rows = [...table.querySelectorAll("tr[data-trial]")];
  const rowOf = new Map(rows.map((row) => [Number(row.dataset.trial), row]).reverse()); // its own, not its repetitions'
  const words = root.querySelector("[data-told]");
  const chosen = (name) => root.querySelector(`[data-choose=${name}]`).value;
  const charts = new Map();
  const near = new Set();
  const pinned = new Set();
  let shown = trials;
  let marked = new Set();
  let pointed = null;

  // What the page knows of a trial, above what a chart says of one of its points.
  const heads = new Map();
  const headOf = (number) => {
    if (!heads.has(number)) {
      const [name, ...cells] = [...rowOf.get(number).cells].map((cell) => cell.textContent);
      const settings = cells.pop().replace(/((?:[^,]+, ){2}[^,]+), /g, "$1,<br>");
      heads.set(number, `<b>${name}</b><br>${settings}<br>${cells.pop()}<br>`);
    }
    return heads.get(number);
  };

  const kept = (trace) => {
    if (!trace.customdata || shown === trials) return trace;
    const places = [...trace.customdata.keys()].filter((place) =>
      trace.customdata[place] === null || shown.has(trace.customdata[place]));
    const pick = (list) => Array.isArray(list) ? places.map((place) => list[place]) : list;
    const marker = trace.marker && { ...trace.marker, symbol: pick(trace.marker.symbol) };
    const [x, y, text, customdata] = [trace.x, trace.y, trace.text, trace.customdata].map(pick);
    return { ...trace, marker, x, y, text, customdata };
  };
  // Marks lie above the chart in an SVG of their own: plotly would draw thousands of points anew for each.
  const paths = (place, wanted) => {
    const { xaxis, yaxis } = place._fullLayout;
    let line = "", dots = "";
    for (const trace of place.data) {
      (trace.customdata || []).forEach((number, at) => {
        if (number === null || !wanted(number)) return;
        const x = xaxis.d2p(trace.x[at]).toFixed(1), y = yaxis.d2p(trace.y[at]).toFixed(1);
        line += (at && trace.customdata[at - 1] === number && trace.mode !== "markers" ? "L" : "M") + `${x} ${y}`;
        dots += `M${x} ${y}h0`;
      });
    }
    return [line, dots];
  };
  const looks = [["marked", (number) => marked.has(number)], ["pointed", (number) => number === pointed]];
  const mark = (place, only) => {
    const { xaxis, yaxis } = place._fullLayout;
    const above = charts.get(place).above;
    Object.assign(above.style, { left: `${xaxis._offset}px`, top: `${yaxis._offset}px` });
    above.setAttribute("width", xaxis._length);
    above.setAttribute("height", yaxis._length);
    for (const [name, wanted] of looks) {
      if (only && only !== name) continue;
      const [line, dots] = above.querySelectorAll(`.${name}`);
      [line, dots].forEach((path, at) => path.setAttribute("d", paths(place, wanted)[at]));
    }
  };
  const draw = (place) => {
    const chart = charts.get(place);
    chart.stale = false;
    const { data, layout } = chart.figure;
    return Plotly.react(place, data.map(kept), layout, config);
  };
  const watch = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      near[isIntersecting ? "add" : "delete"](target);
      if (isIntersecting && charts.get(target).stale) draw(target);
      else if (isIntersecting) mark(target);
    }
  });

  const best = () => {
    const ranked = new Map();
    for (const trial of shown.values()) {
      if (trial.value === null) continue;
      if (!ranked.has(trial.rank)) ranked.set(trial.rank, []);
      ranked.get(trial.rank).push(trial);
    }
    return [...ranked.values()].flatMap((own) =>
      own.sort((one, other) => one.value - other.value).slice(0, Number(chosen("best"))));
  };
  // A browser takes long to lay out thousands of rows: some, and all that are marked, until all are asked for.
  let room = 100;
  const list = () => {
    let place = 0;
    for (const row of rows) {
      const number = Number(row.dataset.trial);
      row.hidden = !shown.has(number) || ((place += 1) > room && !marked.has(number));
    }
    more.hidden = place <= room;
    more.textContent = `Show all ${shown.size} trials in the table`;
  };
  const more = document.createElement("button");
  more.type = "button";
  more.addEventListener("click", () => { room = Infinity; list(); });
  table.parentElement.after(more);
  const markAll = () => {
    marked = new Set([...best().map((trial) => trial.number), ...pinned]);
    for (const row of rows) {
      const number = Number(row.dataset.trial);
      row.classList.toggle("marked", marked.has(number));
      if (pinned.has(number)) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
    }
    list();
    const names = [...marked].filter((number) => shown.has(number)).map((number) => rowOf.get(number).cells[0].textContent);
    const more = names.length > 12 ? ` and ${names.length - 12} more` : "";
    words.textContent = `${shown.size} of ${trials.size} trials`
      + (names.length ? `; marked: ${names.slice(0, 12).join(", ")}${more}` : "");
    near.forEach((place) => { if (!charts.get(place).stale) mark(place); });
  };
  const filter = () => {
    const fits = (trial) => ["family", "ending"].every((key) => !chosen(key) || trial[key] === Number(chosen(key)));
    shown = chosen("family") || chosen("ending") ? new Map([...trials].filter(([, trial]) => fits(trial))) : trials;
    for (const chart of charts.values()) chart.stale = true;
    markAll();
    near.forEach(draw);
  };
  const trialAt = (element) => {
    const row = element.closest("tr[data-trial]");
    return row && Number(row.dataset.trial);
  };
  const point = (wanted) => {
    // What has the focus is pointed at where the pointer is at no trial.
    const number = wanted ?? trialAt(document.activeElement);
    if (number === pointed) return;
    for (const row of rows) {
      if (row.classList.contains("pointed")) row.classList.remove("pointed");
      if (Number(row.dataset.trial) === number) row.classList.add("pointed");
    }
    pointed = number;
    near.forEach((place) => mark(place, "pointed"));
  };
  const pin = (number) => {
    if (!pinned.delete(number)) pinned.add(number);
    markAll();
  };

  for (const name of ["family", "ending"]) root.querySelector(`[data-choose=${name}]`).addEventListener("change", filter);
  root.querySelector("[data-choose=best]").addEventListener("change", markAll);
  table.addEventListener("pointerover", (event) => point(trialAt(event.target)));
  table.addEventListener("pointerleave", () => point(null));
  table.addEventListener("focusin", (event) => point(trialAt(event.target)));
  table.addEventListener("focusout", () => point(null));
  table.addEventListener("click", (event) => { if (trialAt(event.target) !== null) pin(trialAt(event.target)); });
  // One row is reached by Tab, the others from it by arrows: two thousand stops would be a wall.
  rows.forEach((row, place) => { row.tabIndex = place ? -1 : 0; });
  const go = (to) => {
    rows.forEach((row) => { if (row.tabIndex === 0) row.tabIndex = -1; });
    to.tabIndex = 0;
    to.focus();
  };
  table.addEventListener("keydown", (event) => {
    const here = event.target.closest("tr[data-trial]");
    if (!here) return;
    if (event.key === "End") { room = Infinity; list(); }
    const open = rows.filter((row) => !row.hidden);
    const place = open.indexOf(here);
    const steps = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: open.length - 1 };
    if (event.key in steps) go(open[Math.max(0, Math.min(open.length - 1, steps[event.key]))]);
    else if (event.key === "Enter" || event.key === " ") pin(Number(here.dataset.trial));
    else return;
    event.preventDefault();
  });
  markAll();

  return async (place, figure) => {
    for (const trace of figure.data) {
      if (trace.customdata) {
        trace.text = trace.text.map((text, at) => {
          const number = trace.customdata[at];
          return rowOf.has(number) ? headOf(number) + text : text;
        });
      }
    }
    const above = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    above.classList.add("above");
    above.innerHTML = looks.map(([name]) => `<path class="${name}"/><path class="${name} dots"/>`).join("");
    charts.set(place, { figure, above, stale: false });
    await draw(place);
    place.append(above);
    mark(place);
    watch.observe(place);
    place.on("plotly_afterplot", () => mark(place));
    place.on("plotly_hover", (event) => point(event.points[0].customdata ?? null));
    place.on("plotly_unhover", () => point(null));
    place.on("plotly_click", (event) => { if (trials.has(event.points[0].customdata)) pin(event.points[0].customdata); });
  };
};
