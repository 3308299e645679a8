// Cards, tables and sample texts. Texts of a run are only ever set as text, never as markup.
"use strict";
window.ekidenTables = (() => {
  const get = id => document.getElementById(id);
  const number = (v, digits = 4) => v === null || v === undefined ? "–" : Number(v).toLocaleString("en", { maximumSignificantDigits: digits });
  const whole = v => v === null || v === undefined ? "–" : Math.round(v).toLocaleString("en");
  const bytes = v => v >= 1e9 ? `${number(v / 1e9, 3)} GB` : `${number(v / 1e6, 3)} MB`;
  const short = v => v === null || v === undefined || v < 1e6 ? whole(v) : v < 1e9 ? `${number(v / 1e6, 3)} M` : `${number(v / 1e9, 3)} B`;
  const percent = v => `${(100 * v).toFixed(1)} %`;
  const when = v => v ? new Date(v * 1000).toISOString().slice(0, 19).replace("T", " ") : "–";
  function duration(s) {
    if (s < 60) return `${number(s, 3)} s`;
    const m = Math.floor(s / 60);
    return m < 60 ? `${m} min ${Math.floor(s % 60)} s` : `${Math.floor(m / 60)} h ${m % 60} min`;
  }
  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }
  // columns: [title, cell(row) => text or [text, class], class]
  function table(id, columns, rows, empty) {
    const head = element("tr"), all = [head];
    columns.forEach(([title, , className]) => head.append(element("th", title, className)));
    for (const row of rows) {
      const line = element("tr");
      for (const [, cell, className] of columns) {
        const value = cell(row), [text, more] = Array.isArray(value) ? value : [value, ""];
        line.append(element("td", text, [className, more].filter(Boolean).join(" ")));
      }
      all.push(line);
    }
    if (!rows.length) { const line = element("tr"), cell = element("td", empty); cell.colSpan = columns.length; line.append(cell); all.push(line); }
    get(id).replaceChildren(...all);
  }

  function cards(run) {
    const seconds = run.sessions.reduce((sum, s) => sum + (s.ended - s.began), 0);
    const last = Object.entries(run.evaluation.loss).map(([l, c]) => [l, c.y[c.y.length - 1]]);
    const mean = last.find(([l]) => l === "mean of languages") || last[0];
    const speed = run.curves.tokens_per_second, interrupted = run.marks.filter(m => m.kind === "interruption").length;
    const list = [["step", whole(run.step), run.max_steps ? `of ${whole(run.max_steps)}` : ""], ["tokens", short(run.tokens), ""],
      ["training loss", number(run.loss), ""], ["validation loss", mean ? number(mean[1]) : "–", mean ? mean[0] : ""],
      ["speed", speed ? number(speed.y[speed.y.length - 1], 3) : "–", "tokens/s"], ["sessions", whole(run.sessions.length), interrupted === 1 ? "1 interruption" : `${interrupted} interruptions`],
      ["time in sessions", duration(seconds), ""],
      ["parameters", run.model.parameters_in_blocks ? short(run.model.parameters_in_blocks + run.model.parameters_in_embedding) : "–", run.preset]];
    get("cards").replaceChildren(...list.map(([name, value, small]) => {
      const box = element("div"), dd = element("dd", value + " ");
      if (small) dd.append(element("small", small));
      box.append(element("dt", name), dd);
      return box;
    }));
  }

  let language = null, position = null;
  function samples(run) {
    const sets = run.samples, parent = get("samples");
    get("samples-section").hidden = !sets.length;
    if (!sets.length) return;
    const languages = [...new Set(sets.flatMap(s => Object.keys(s.languages)))];
    const following = position === null || position >= sets.length - 1;
    const at = following ? sets.length - 1 : position;
    const controls = element("div", undefined, "controls"), choice = element("select"), slider = element("input"), label = element("span");
    choice.append(...["all languages", ...languages].map(l => { const o = element("option", l); o.value = l; return o; }));
    choice.value = languages.includes(language) ? language : "all languages";
    slider.type = "range"; slider.min = 0; slider.max = sets.length - 1; slider.value = at;
    slider.setAttribute("aria-label", "step of the sample texts"); choice.setAttribute("aria-label", "language of the sample texts");
    const texts = element("div", undefined, "texts");
    const fill = () => {
      const set = sets[Number(slider.value)];
      label.textContent = `step ${whole(set.step)}`;
      texts.replaceChildren(...Object.entries(set.languages).filter(([l]) => choice.value === "all languages" || l === choice.value)
        .flatMap(([l, items]) => items.map(item => {
          const box = element("article");
          box.append(element("h4", l), element("span", item.prompt, "prompt"), element("span", " " + item.text));
          return box;
        })));
    };
    slider.oninput = () => { position = Number(slider.value); fill(); };
    choice.onchange = () => { language = choice.value; fill(); };
    controls.append(choice);
    if (sets.length > 1) controls.append(slider);
    controls.append(label);
    parent.replaceChildren(controls, texts);
    fill();
  }

  function sessionTable(rows) {
    const device = s => s.environment.device || "–";
    const hardware = s => [`${s.hardware.cores || "?"} cores`, s.hardware.memory_bytes ? bytes(s.hardware.memory_bytes) : "", s.hardware.device_memory_bytes ? `device ${bytes(s.hardware.device_memory_bytes)}` : "",
      s.hardware.processes > 1 ? `${s.hardware.processes} processes` : "", s.hardware.system].filter(Boolean).join(", ");
    const same = s => s.level ? s.level + (s.differing.length ? ": " + s.differing.join("; ") : "") : "–";
    table("sessions", [["session", s => s.label], ["steps", s => `${whole(s.first_step)} – ${whole(s.last_step)}`], ["began (UTC)", s => when(s.began)], ["lasted", s => duration(s.ended - s.began)],
      ["ended", s => s.status ? [s.reason ? `${s.status}: ${s.reason}` : s.status, s.status === "failed" ? "bad" : ""] : "not yet"], ["device", device, "long"], ["precision", s => s.environment.precision || "–"],
      ["sameness at resume", same], ["machine", hardware, "long"], ["versions", s => Object.entries(s.versions).map(([n, v]) => `${n} ${v}`).join(", "), "long"],
      ["changed settings", s => Object.entries(s.changed).map(([n, [a, b]]) => `${n}: ${a} → ${b}`).join("; ") || "–"]], rows, "none");
  }

  return runs => {
    const run = runs[runs.length - 1];
    if (!run) return;
    const one = runs.length === 1;
    const title = one ? run.name : `${runs.length} runs`;
    document.title = `${title} – Ekiden`;
    get("title").textContent = title;
    get("status").textContent = one ? run.status : runs.map(r => `${r.name}: ${r.status}`).join(" · ");
    const labelled = (list, name) => runs.flatMap(r => r[list].map((row, i) => ({ ...row, label: one ? name(row, i) : `${r.name} ${name(row, i)}` })));
    get("shortened").hidden = !runs.some(r => r.records > r.points);
    get("shortened").textContent = `Curves of more than ${whole(run.points)} records (here ${whole(Math.max(...runs.map(r => r.records)))}) show the lowest and the highest value of each of about ${whole(run.points / 2)} equal pieces: no spike is lost.`;
    cards(run);
    samples(run);
    table("mixture", [["language", m => m.language], ["training tokens", m => whole(m.tokens), "number"], ["planned", m => percent(m.planned), "number"], ["seen", m => percent(m.seen), "number"],
      ["epochs so far", m => number(m.epochs, 3), "number"]], one ? run.mixture : [], "none");
    table("checkpoints", [["checkpoint", c => c.label], ["step", c => whole(c.step), "number"], ["size", c => bytes(c.bytes), "number"], ["loss", c => number(c.loss), "number"],
      ["written (UTC)", c => when(c.time)], ["state", c => [c.state, c.state === "complete" ? "good" : "bad"]]], labelled("checkpoints", c => c.name), "none");
    sessionTable(labelled("sessions", (_, i) => String(i + 1)));
    table("events", [["step", m => whole(m.step), "number"], ["what", m => m.label]], labelled("marks", m => m.text), "none");
    table("settings", [["setting", ([n]) => n, "code"], ["value", ([, v]) => v, "code"]], Object.entries(run.config), "config.yaml is missing");
    get("footer").textContent = `Written ${when(run.written)} UTC.`;
  };
})();
