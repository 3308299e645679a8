// Curves of one run or several, drawn by plotly when they come into view. Everything is in window.ekiden.
"use strict";
window.ekiden = (() => {
  const COLOURS = ["#1f6fb4", "#d1651a", "#2b8a5a", "#a53fa0", "#8a6d1f", "#c0394b", "#4a5fc1", "#6b7280"];
  const DARK = ["#6cb2ee", "#f2a25c", "#6fd39b", "#d993d4", "#d8bd6a", "#ff8a94", "#9aa9ff", "#a7b0bb"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 760px)");
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = i => (dark.matches ? DARK : COLOURS)[i % COLOURS.length];
  let runs = [], waiting = new Set(), drawn = new Set();

  const CHARTS = [
    { id: "loss", title: "Loss", unit: "nats a token", wide: true, curve: "loss", evaluation: "loss", marks: true },
    { id: "bits", title: "Bits per byte", unit: "validation, comparable between tokenizers", evaluation: "bits_per_byte" },
    { id: "rate", title: "Learning rate", unit: "", curve: "learning_rate" },
    { id: "gradient", title: "Gradient norm", unit: "before clipping", curve: "grad_norm", log: true },
    { id: "speed", title: "Speed", unit: "tokens a second", curve: "tokens_per_second", zero: true },
    { id: "mfu", title: "MFU", unit: "share of the devices' peak", curve: "mfu", zero: true, percent: true },
    { id: "memory", title: "Memory", unit: "GB at the highest", curve: "memory_bytes", scale: 1e-9, zero: true },
  ];

  function traces(chart) {
    const list = [], several = runs.length > 1;
    runs.forEach((run, i) => {
      const curve = chart.curve && run.curves[chart.curve];
      const scaled = ys => chart.scale ? ys.map(y => y === null ? null : y * chart.scale) : ys;
      if (curve) list.push({ x: curve.x, y: scaled(curve.y), name: several ? run.name : chart.evaluation ? "training" : chart.title,
        mode: "lines", line: { color: colour(several ? i : 0), width: 1.3 }, opacity: chart.evaluation ? .75 : 1 });
      const languages = chart.evaluation ? Object.entries(run.evaluation[chart.evaluation] || {}) : [];
      languages.forEach(([language, points], j) => list.push({ x: points.x, y: points.y,
        name: several ? `${run.name}: ${language}` : language, mode: "lines+markers", marker: { size: 5, symbol: j },
        line: { color: colour(several ? i : 1 + j), width: 1.6, dash: language === "mean of languages" ? "dot" : "solid" } }));
      if (chart.marks && run.marks.length) list.push({ x: run.marks.map(m => m.step), y: run.marks.map(() => .03), yaxis: "y2",
        text: run.marks.map(m => m.text), hoverinfo: "text", mode: "markers", name: several ? `${run.name}: events` : "events",
        marker: { symbol: "triangle-up", size: 10, color: run.marks.map(m => css(m.kind === "resume-verified" ? "--good" : m.kind === "interruption" ? "--mark" : "--bad")) } });
    });
    return list;
  }

  function shapes() {
    if (runs.length !== 1) return [];
    const bands = runs[0].sessions.filter((_, i) => i % 2).map(s => ({ type: "rect", xref: "x", yref: "paper", x0: s.first_step,
      x1: s.last_step, y0: 0, y1: 1, fillcolor: css("--band"), line: { width: 0 }, layer: "below" }));
    const lines = runs[0].marks.filter(m => m.kind !== "resume-verified").slice(0, 200).map(m => ({ type: "line", xref: "x", yref: "paper",
      x0: m.step, x1: m.step, y0: 0, y1: 1, line: { color: css(m.kind === "interruption" ? "--mark" : "--bad"), width: 1, dash: "dot" } }));
    return bands.concat(lines);
  }

  // Every chart has the same steps below it.
  function steps() {
    const last = Math.max(1, ...runs.map(r => r.step));
    return [-.01 * last, 1.015 * last];
  }

  function layout(more) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), tickfont: { size: 11 } };
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 }, autosize: true,
      margin: { l: 52, r: 14, t: 8, b: 36 }, dragmode: narrow.matches ? false : "zoom", hovermode: "closest",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") }, namelength: -1 },
      ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } };
  }

  const options = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };

  function draw(chart) {
    const list = traces(chart), box = document.getElementById(`chart-${chart.id}`);
    box.hidden = list.length === 0;
    if (!list.length) return;
    const legend = list.length > 1;
    const ready = Plotly.react(`plot-${chart.id}`, list, layout({
      showlegend: legend, legend: { orientation: "h", y: chart.wide ? -.14 : -.2, yanchor: "top", font: { size: 11 } },
      margin: { l: 52, r: 14, t: 8, b: legend ? 56 : 36 }, shapes: shapes(), uirevision: runs.map(r => r.name).join(),
      xaxis: { title: { text: "step", font: { size: 11 }, standoff: 4 }, range: steps() },
      yaxis: { type: chart.log ? "log" : "linear", dtick: chart.log ? "D2" : undefined, rangemode: chart.zero ? "tozero" : "normal", tickformat: chart.percent ? ".0%" : "",
        exponentformat: "power", minexponent: 4 },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    }), options);
    drawn.add(chart.id);
    ready.then(() => requestAnimationFrame(() => { document.documentElement.dataset.drawn ||= String(Math.round(performance.now())); }));
  }

  const BARS = { "mixture-chart": mixtureBars, "time-chart": timeBars };
  const observer = new IntersectionObserver(entries => entries.forEach(entry => {
    if (!entry.isIntersecting || !waiting.delete(entry.target.id)) return;
    const chart = CHARTS.find(c => `chart-${c.id}` === entry.target.id);
    if (chart) draw(chart);
    else { BARS[entry.target.id](); drawn.add(entry.target.id); }
  }), { rootMargin: "100px" });

  function build() {
    const parent = document.getElementById("charts");
    for (const chart of CHARTS) {
      const box = document.createElement("div");
      box.className = chart.wide ? "chart wide" : "chart";
      box.id = `chart-${chart.id}`;
      const heading = document.createElement("h3"), unit = document.createElement("small"), plot = document.createElement("div");
      unit.textContent = chart.unit ? ` ${chart.unit}` : "";
      heading.append(chart.title, unit);
      plot.className = "plot"; plot.id = `plot-${chart.id}`;
      box.append(heading, plot);
      parent.append(box);
      waiting.add(box.id);
      observer.observe(box);
    }
    for (const id of Object.keys(BARS)) {
      waiting.add(id);
      observer.observe(document.getElementById(id));
    }
  }

  // Show these runs: curves in view are drawn now, the others when they come into view.
  function show(next) {
    const first = !document.getElementById("chart-loss");
    runs = next;
    if (first) build();
    for (const chart of CHARTS) {
      document.getElementById(`chart-${chart.id}`).hidden = traces(chart).length === 0;
      if (drawn.has(chart.id)) draw(chart);
    }
    document.getElementById("mixture-section").hidden = runs.length !== 1 || !runs[0].mixture.length;
    for (const id of Object.keys(BARS)) if (drawn.has(id)) BARS[id]();
    widen();
  }

  // An odd chart at the end takes both columns instead of leaving a hole.
  function widen() {
    const shown = CHARTS.filter(c => !c.wide).map(c => document.getElementById(`chart-${c.id}`)).filter(box => !box.hidden);
    shown.forEach((box, i) => box.classList.toggle("last", shown.length % 2 === 1 && i === shown.length - 1));
  }

  const bar = (name, y, x, i, more) => ({ type: "bar", orientation: "h", name, y, x, marker: { color: colour(i) }, ...more });

  function barLayout(id, rows, rowHeight, more) {
    const top = narrow.matches && id === "time-chart" ? 160 : 44, height = top + 48 + rowHeight * rows;
    document.getElementById(id).style.height = `${height}px`;
    return layout({ height, margin: { l: 12, r: 18, t: top, b: 40 }, legend: { orientation: "h", y: 1, yanchor: "bottom", traceorder: "normal", font: { size: 11 } },
      yaxis: { autorange: "reversed", automargin: true, fixedrange: true, ticksuffix: " " }, ...more });
  }

  function mixtureBars() {
    const mixture = runs.length === 1 ? runs[0].mixture : [], names = mixture.map(m => m.language);
    if (!mixture.length) return;
    const percent = { hovertemplate: "%{y}: %{x:.1%}" };
    Plotly.react("mixture-chart", [bar("planned", names, mixture.map(m => m.planned), 7, percent), bar("seen", names, mixture.map(m => m.seen), 0, percent)],
      barLayout("mixture-chart", names.length, 40, { barmode: "group", xaxis: { tickformat: ".0%", rangemode: "tozero" } }), options);
  }

  function timeBars() {
    const run = runs.length === 1 ? runs[0] : null;
    const sessions = runs.flatMap(r => r.sessions.map((s, i) => [s, run ? `session ${i + 1}` : `${r.name} ${i + 1}`]));
    const shown = sessions.slice(-30), labels = shown.map(([, label]) => label), kinds = ["starting", "training", "evaluation", "samples", "saving"];
    const seconds = (s, kind) => s.seconds[kind] || 0;
    const rest = shown.map(([s]) => Math.max(0, (s.seconds.total || s.ended - s.began) - kinds.reduce((sum, k) => sum + seconds(s, k), 0)));
    const away = run ? shown.map(([s], i) => i + 1 < shown.length ? Math.max(0, shown[i + 1][0].began - s.ended) : 0) : [];
    const longest = Math.max(...shown.map(([s]) => s.seconds.total || s.ended - s.began), 0);
    const [unit, size] = longest > 7200 ? ["hours", 3600] : longest > 300 ? ["minutes", 60] : ["seconds", 1];
    const hover = { hovertemplate: `%{y}: %{x:.2f} ${unit}` }, scaled = list => list.map(v => v / size);
    const list = kinds.map((kind, i) => bar(kind, labels, scaled(shown.map(([s]) => seconds(s, kind))), [3, 0, 2, 4, 1][i], hover));
    list.push(bar("other or not recorded", labels, scaled(rest), 7, hover));
    if (away.some(v => v > 0)) list.push(bar("waiting for the next session", labels, scaled(away), 5, { ...hover, visible: "legendonly" }));
    Plotly.react("time-chart", list, barLayout("time-chart", shown.length, 30,
      { barmode: "stack", xaxis: { title: { text: unit, font: { size: 11 }, standoff: 4 }, rangemode: "tozero" } }), options);
  }

  const again = () => { if (runs.length) show(runs); };
  dark.addEventListener("change", again);
  narrow.addEventListener("change", again);
  return { show, colour, get runs() { return runs; } };
})();
