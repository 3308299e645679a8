// The live page: ask for each run every two seconds, show the chosen ones, and let any checkpoint write.
"use strict";
(async () => {
  const PERIOD = 2000;
  const names = await (await fetch("/api/runs")).json();
  const have = names.map(() => 0), data = names.map(() => null), chosen = new Set(names.keys());
  const get = id => document.getElementById(id);

  function choices() {
    if (names.length < 2) return;
    get("runs").replaceChildren(...names.map((name, i) => {
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox"; box.checked = chosen.has(i);
      box.onchange = () => { box.checked ? chosen.add(i) : chosen.delete(i); show(); };
      label.append(box, name);
      return label;
    }));
  }
  function show() {
    const runs = data.filter((d, i) => d && chosen.has(i));
    if (runs.length) { window.ekidenTables(runs); window.ekiden.show(runs); }
    checkpoints();
  }

  async function ask(i) {
    const answer = await fetch(`/api/runs/${i}?have=${have[i]}`);
    if (answer.status !== 200) return false;
    have[i] = Number(answer.headers.get("X-Version"));
    data[i] = { ...await answer.json(), name: names[i] };
    return true;
  }
  async function refresh() {
    try {
      const changed = await Promise.all(names.map((_, i) => ask(i)));
      if (changed.some(Boolean)) show();
      document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates || 0) + 1;
    } catch (error) {
      get("status").textContent = "The dashboard has ended.";
    }
    setTimeout(refresh, PERIOD);
  }

  function playground() {
    const section = get("playground");
    section.hidden = false;
    section.innerHTML = `<h2>Playground</h2><textarea id="prompt" aria-label="prompt" placeholder="The beginning of a text"></textarea>
      <div class="controls"><label>checkpoint <select id="checkpoint"></select></label><label>temperature <input id="temperature" type="number" min="0" max="5" step="0.1" value="0.8"></label>
      <label>tokens <input id="tokens" type="number" min="1" max="1000" value="64"></label><label>seed <input id="seed" type="number" min="0" value="0"></label>
      <button id="generate">Continue</button></div><p id="answer" aria-live="polite" hidden></p>`;
    get("generate").onclick = generate;
  }
  function checkpoints() {
    const select = get("checkpoint"), before = select.value, options = [];
    data.forEach((run, i) => run && run.checkpoints.filter(c => c.state === "complete").forEach(c => {
      const option = document.createElement("option");
      option.value = JSON.stringify([i, c.name]);
      option.textContent = names.length > 1 ? `${names[i]}: ${c.name}` : c.name;
      options.push(option);
    }));
    if (options.map(o => o.value).join() === [...select.options].map(o => o.value).join()) return;
    select.replaceChildren(...options);
    if (options.some(o => o.value === before)) select.value = before;
    get("generate").disabled = !options.length;
  }
  async function generate() {
    const [run, checkpoint] = JSON.parse(get("checkpoint").value), button = get("generate"), box = get("answer");
    const asked = { run, checkpoint, prompt: get("prompt").value, temperature: Number(get("temperature").value),
      max_new_tokens: Number(get("tokens").value), seed: Number(get("seed").value) };
    const prompt = document.createElement("span"), text = document.createElement("span");
    prompt.className = "prompt"; prompt.textContent = asked.prompt;
    box.hidden = false; box.dataset.done = ""; box.replaceChildren(prompt, text);
    button.disabled = true;
    try {
      const answer = await fetch("/api/generate", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
      text.className = answer.ok ? "" : "bad";
      if (!answer.ok) prompt.textContent = "";
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let piece = await reader.read(); !piece.done; piece = await reader.read()) text.textContent += piece.value;
    } catch (error) {
      text.className = "bad"; text.textContent = "The dashboard did not answer.";
    }
    button.disabled = false;
    box.dataset.done = "yes";
  }

  choices();
  playground();
  refresh();
})();
