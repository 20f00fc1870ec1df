"use strict";
const at = id => document.getElementById(id);
const still = at("data") ? JSON.parse(at("data").textContent) : null;
const state = {tokens: [], results: new Map(), waiting: new Map(), chosen: new Set(), shown: null, pair: null, body: null, stop: null};
const SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"};
const visible = text => [...String(text)].map(c => SIGNS[c] ?? (/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u.test(c) && !/[\u200c\u200d]/.test(c) ? "\ufffd" : c)).join("");
const number = value => typeof value === "number" ? value.toFixed(2) : "–";

/* Elements are made of text alone: nothing that a model says is ever read as HTML. */
function make(name, attributes = {}, ...inside) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") element.addEventListener("click", value); else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...inside);
  return element;
}
const button = (text, onclick) => make("button", {type: "button", onclick, class: "live"}, text);
function table(caption, head, rows) {
  return make("table", {class: "figures"}, make("caption", {class: "chip"}, caption),
    make("thead", {}, make("tr", {}, ...head.map(cell => make("th", {scope: "col"}, cell)))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map(cell => make("td", {}, cell))))));
}
function bar(value) {
  const inner = make("i"), outer = make("span", {class: "bar", "aria-hidden": "true"}, inner);
  inner.style.width = Math.max(0, Math.min(1, value || 0)) * 100 + "%";
  return outer;
}
const say = text => { at("status").textContent = text; };
const trouble = text => { at("trouble").textContent = text; };

async function ask(route, body, signal) {
  const headers = {"Content-Type": "application/json"}, key = at("key").value;
  if (key) headers["X-SECRET-KEY"] = key;
  const reply = await fetch(route, {method: "POST", headers, body: JSON.stringify(body), signal});
  if (!reply.ok) {
    const {detail} = await reply.json().catch(() => ({detail: reply.statusText}));
    throw new Error(typeof detail === "string" ? detail : detail.map(each => each.loc.slice(1).join(".") + ": " + each.msg).join("; "));
  }
  return reply;
}
async function attempt(what, work) {
  trouble(""); say(what + " …");
  try { const found = await work(); say(what + ": done"); return found; }
  catch (error) { say(""); if (error.name !== "AbortError") trouble(error.message); }
}
const answer = async (route, body) => (await ask(route, body)).json();

function asked() {
  const text = at("text").value;
  if (document.querySelector("input[name=kind]:checked").value === "text") return {text};
  const messages = [];
  for (const line of text.split("\n")) {
    const found = /^(user|assistant|system):\s?(.*)$/i.exec(line);
    if (found) messages.push({role: found[1].toLowerCase(), content: found[2]});
    else if (messages.length) messages.at(-1).content += "\n" + line;
    else if (line.trim()) messages.push({role: "user", content: line});
  }
  return {messages};
}

async function tokenize() {
  const body = asked(), found = await attempt("Tokens", () => answer("tokenize", body));
  if (!found) return;
  Object.assign(state, {tokens: found.tokens, body, shown: null, pair: null});
  for (const kept of [state.results, state.waiting, state.chosen]) kept.clear();
  at("detail").hidden = at("pair").hidden = true;
  if (found.tokens.length <= 16) found.tokens.forEach(token => state.chosen.add(token.position));
  else state.chosen.add(found.tokens.length - 1);
  draw(); paint();
}

async function explain() {
  const positions = [...state.chosen].sort((a, b) => a - b), stop = new AbortController();
  if (!positions.length) return;
  state.stop = stop; paint();
  await attempt("Explaining " + positions.length + " tokens", async () => {
    const options = {temperature: Number(at("temperature").value), search: at("search").value, seed: Number(at("seed").value)};
    const reply = await ask("explain", {...state.body, ...options, positions, stream: true, reverse: false}, stop.signal);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", failed = null;
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") continue;
        const frame = JSON.parse(line.slice(6));
        if (frame.error) failed = frame.error;
        else if ("description" in frame) { state.results.set(frame.position, frame); state.waiting.delete(frame.position); }
        else if ("text" in frame) state.waiting.set(frame.position, frame.text);
      }
      paint();
    }
    if (failed) throw new Error(failed);
  });
  state.stop = null; state.waiting.clear(); paint();
  if (state.results.has(positions[0])) show(positions[0]);
}

/* ------------------------------------------------------------------------------------------------ the text and its tokens */
function draw() {
  let part = null;
  const box = at("tokens");
  box.replaceChildren();
  for (const token of state.tokens) {
    const now = token.role ? token.role + " " + token.section : null;
    if (now !== part && now) box.append(make("span", {class: "chip", "aria-hidden": "true"}, " " + now + " "));
    part = now;
    const piece = token.fragment_count > 1 && token.fragment_index ? "·" : visible(token.token).replace("⏎", "⏎\n") || "·";
    const trained = token.megalens ? token.megalens.trained : true;
    box.append(make("span", {class: "t" + (token.fragment_index ? " part" : "") + (trained ? "" : " out"), role: "option",
      tabindex: token.position ? "-1" : "0", "data-at": token.position, "aria-selected": "false"}, piece));
  }
}
const spans = () => [...at("tokens").querySelectorAll(".t")];
function paint() {
  for (const span of spans()) {
    const position = Number(span.dataset.at), found = state.results.get(position);
    span.setAttribute("aria-selected", String(state.chosen.has(position)));
    span.classList.toggle("told", !!found);
    span.classList.toggle("wait", state.waiting.has(position));
    span.classList.toggle("shown", state.shown === position);
    if (!found) continue;
    const fve = found.megalens.fve ?? 0;
    span.style.setProperty("--v", Math.min(1, Math.abs(fve)));
    span.classList.toggle("bad", fve < 0);
    span.classList.toggle("out", found.megalens.trained === false);
    span.setAttribute("aria-label", visible(found.token) + ": " + visible(found.description) + ", FVE " + number(fve));
    span.title = visible(found.description) + " · FVE " + number(fve);
  }
  at("explain").disabled = !state.chosen.size || !!state.stop;
  at("explain").textContent = "Explain " + state.chosen.size + " chosen token" + (state.chosen.size === 1 ? "" : "s");
  at("stop").disabled = !state.stop;
}
let from = null, dragged = false, before = new Set();
function choose(a, b, more) {
  state.chosen = new Set(more ? before : []);
  for (let i = Math.min(a, b); i <= Math.max(a, b); i++) state.chosen.add(i);
  paint();
}
at("tokens").addEventListener("pointerdown", event => {
  const token = event.target.closest(".t");
  if (!token) return;
  from = Number(token.dataset.at); dragged = false;
  before = new Set(event.ctrlKey || event.metaKey ? state.chosen : []);
});
addEventListener("pointermove", event => {
  if (from === null || still) return;
  const token = document.elementFromPoint(event.clientX, event.clientY)?.closest?.(".t");
  if (token && Number(token.dataset.at) !== from) dragged = true;
  if (token && dragged) choose(from, Number(token.dataset.at), true);
});
addEventListener("pointerup", event => {
  if (from === null) return;
  const position = from;
  from = null;
  if (dragged) return;
  if (!event.target.closest?.(".t")) return;
  if (state.pair !== null && state.results.has(position)) return compare(state.pair, position);
  if (!still) {
    if (event.shiftKey && state.chosen.size) choose([...state.chosen][0], position, true);
    else if (state.chosen.has(position) && !state.results.has(position)) { state.chosen.delete(position); paint(); }
    else { state.chosen.add(position); paint(); }
  }
  if (state.results.has(position)) show(position);
});
at("tokens").addEventListener("keydown", event => {
  const all = spans(), now = all.indexOf(event.target);
  if (now < 0) return;
  const to = {ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: all.length - 1}[event.key];
  if (to !== undefined && all[to]) {
    event.preventDefault();
    all[now].tabIndex = -1; all[to].tabIndex = 0; all[to].focus();
    if (event.shiftKey && !still) { state.chosen.add(now).add(to); paint(); }
  } else if (event.key === " " && !still) {
    event.preventDefault();
    if (!state.chosen.delete(now)) state.chosen.add(now);
    paint();
  } else if (event.key === "Enter" && state.results.has(now)) {
    event.preventDefault();
    if (state.pair !== null) compare(state.pair, now); else { show(now); at("detail").focus(); }
  }
});

/* --------------------------------------------------------------------------------------------------- one token's explanation */
function figures(extra) {
  const rows = [["this explanation", number(extra.fve), bar(extra.fve)]];
  if ("fve_copy" in extra) rows.push(["a copy of the last tokens: " + visible(extra.copy), number(extra.fve_copy), bar(extra.fve_copy)]);
  if ("fve_shuffled" in extra) rows.push(["explanations of other texts, mean", number(extra.fve_shuffled), bar(extra.fve_shuffled)],
    ["explanations of other texts, 95th percentile", number(extra.fve_shuffled_p95), bar(extra.fve_shuffled_p95)]);
  return table("FVE, beside what needs no lens", ["", "FVE", ""], rows);
}
function show(position) {
  const found = state.results.get(position), extra = found.megalens, box = at("detail");
  const place = {...state.body, position}, out = make("div", {"aria-live": "polite"});
  const draft = make("textarea", {rows: "3", "aria-label": "edit the explanation", spellcheck: "false"});
  const weight = make("input", {type: "range", min: "0", max: "3", step: "0.25", value: "1", "aria-label": "weight of steering"});
  draft.value = found.description;
  state.shown = position;
  const notes = [extra.search, extra.verdict, extra.norm && "norm " + number(extra.norm) + ", usually " + number(extra.usual_norm),
    extra.trained === false && "outside the positions the lens was trained on"].filter(Boolean);
  const sections = [figures(extra)];
  if (extra.logit_lens) sections.push(table("Logit lens: next tokens if the subject ended here", ["token", "p"],
    extra.logit_lens.map(([token, p]) => [visible(token), number(p)])));
  if (extra.samples) sections.push(draws(extra));
  if (extra.drops) sections.push(phrases(found.description, extra.drops));
  box.replaceChildren(
    make("h2", {}, "Position " + position + ": " + visible(found.token)), make("p", {class: "words"}, visible(found.description) || "(nothing)"),
    make("p", {class: "soft"}, notes.join(" · ")), make("div", {class: "grid"}, ...sections),
    make("div", {class: "live"},
      make("div", {class: "row"}, button("Draw 8 samples", async () => {
        const drawn = await attempt("Samples", () => answer("samples", {...place, k: 8, seed: Number(at("seed").value)}));
        if (drawn) out.replaceChildren(draws(drawn));
      }), button("What does each phrase hold?", async () => {
        const worth = await attempt("Phrases", () => answer("edit", {...place, description: found.description}));
        if (worth) out.replaceChildren(phrases(found.description, worth.drops));
      }), button("Compare with another token", () => { state.pair = position; say("Choose the other token: click it, or press enter on it."); })),
      make("h3", {}, "Edit the explanation"), draft,
      make("div", {class: "row"}, button("New FVE", async () => {
        const worth = await attempt("New FVE", () => answer("edit", {...place, description: draft.value}));
        if (worth) out.replaceChildren(edited(worth, extra, draft.value));
      }), make("label", {}, "weight ", weight), button("Steer the subject and read on", async () => {
        const body = {...place, description: draft.value, weight: Number(weight.value), tokens: 20};
        const done = await attempt("Steering", () => answer("steer", body));
        if (done) out.replaceChildren(make("h3", {}, "The subject goes on (weight " + done.weight + ", KL " + number(done.kl) + " nats)"),
          make("p", {}, make("b", {}, "untouched: "), visible(done.plain)), make("p", {}, make("b", {}, "steered: "), visible(done.patched)));
      }))), out);
  box.hidden = false;
  paint();
}
const draws = found => make("div", {}, table("Samples", ["text", "FVE"], found.samples.map(each => [visible(each.text), number(each.fve)])),
  make("p", {class: "soft"}, "Agreement of their words, 0 to 1: " + number(found.agreement)));
const phrases = (text, drops) => drops.length ? table("What FVE goes with each phrase", ["phrase", "FVE lost", ""],
  drops.map(drop => [visible([...text].length === text.length ? text.slice(drop.start, drop.end) : [...text].slice(drop.start, drop.end).join("")),
    number(drop.delta_fve), bar(drop.delta_fve)])) : make("p", {class: "soft"}, "One phrase: nothing to drop.");
function edited(worth, extra, text) {
  const tokens = worth.before.map(([token, p], i) => [visible(token) + " " + number(p), visible(worth.after[i][0]) + " " + number(worth.after[i][1])]);
  return make("div", {}, make("p", {}, "FVE " + number(extra.fve) + " → " + number(worth.fve) + "; KL of the next token " + number(worth.kl) + " nats"),
    make("div", {class: "grid"}, phrases(text, worth.drops), table("Next tokens", ["untouched", "with this text in its place"], tokens)));
}
async function compare(a, b) {
  state.pair = null;
  const pair = [a, b].map(position => state.results.get(position)), box = at("pair");
  const rows = pair.map(each => [each.position + ": " + visible(each.token), visible(each.description), number(each.megalens.fve)]);
  const parts = [make("h2", {}, "Two tokens"), table("Side by side", ["token", "explanation", "FVE"], rows)];
  if (!still) {
    const found = await attempt("Comparing", async () => {
      const {tokens} = await answer("extract", {...state.body, positions: [a, b]});
      const [x, y] = tokens.map(token => token.activation), options = {temperature: 0};
      return [await answer("compare", {...options, activation_a: x, activation_b: y}), await answer("compare", {...options, activation_a: y, activation_b: x})];
    });
    if (found) parts.push(make("p", {}, "Cosine " + number(found[0].megalens.cos) + ". What the first holds and the second does not: ",
      make("b", {}, visible(found[0].description))), make("p", {}, "And the other way round: ", make("b", {}, visible(found[1].description))),
      make("p", {class: "soft"}, "No lens was trained on differences: read these with care."));
  }
  box.replaceChildren(...parts);
  box.hidden = false;
}

if (still) {
  document.body.classList.add("still");
  state.tokens = still.results;
  for (const each of still.results) state.results.set(each.position, each);
  draw(); paint();
  if (still.results.length) show(still.results.at(-1).position);
} else {
  at("tokenize").addEventListener("click", tokenize);
  at("explain").addEventListener("click", explain);
  at("stop").addEventListener("click", () => state.stop?.abort());
  at("text").addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) tokenize(); });
}
