// The page: one record at a time. Nothing is told to be saved before the server has answered that it is on disk.
import { compared, difference, el, rendered } from "/text.js";

const $ = (id) => document.getElementById(id);
const STATES = ["all", "unreviewed", "reviewed", "accept", "swap", "edit", "reject", "skip", "disagreeing"];
const ORDERS = ["file", "random", "hardest", "longest"];
const REASONS = ["wrong image", "both completions wrong", "no difference", "ground truth wrong", "ambiguous question", "unsafe or private"];
const AHEAD = 3; // records that are fetched before they are asked for
const MAX_DRAFT_ROWS = 24;

const token = (() => { // it is in the part of the link that is sent to nobody, and stays in this tab
  const given = location.hash.slice(1);
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", "/");
  }
  return sessionStorage.getItem("token") ?? "";
})();

const state = { queue: null, at: 0, view: null, info: {}, editing: false, diff: false, raw: false, hidden: false, since: 0, busy: false };
const records = new Map(); // place -> promise of its view
const images = new Map(); // id -> promise of its address in this tab
const drafts = new Map(); // key of a content, as places change with the file -> paths of a text as JSON -> what was written
let asked = 0;
let filterTimer = 0;
let filtered = 0;

// The server

async function ask(path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw Object.assign(new Error("The server does not answer. Is mpo review still running? What you wrote is still here."), { gone: true });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(told.error ?? `The server answered ${answer.status}.`), { ...told, status: answer.status });
}

const json = async (path, body) => (await ask(path, body)).json();

function kept(own, most, key, fetched, forget = () => {}) {
  if (!own.has(key)) {
    const found = fetched();
    own.set(key, found);
    found.catch(() => own.delete(key));
    if (own.size > most) {
      const [oldest, value] = own.entries().next().value;
      own.delete(oldest);
      value.then(forget, () => {});
    }
  }
  return own.get(key);
}

const record = (place) => kept(records, 200, place, () => json(`/api/records/${place}`));
const address = async (id) => URL.createObjectURL(await (await ask(`/api/images/${id}`)).blob());
const forget = (one) => setTimeout(() => URL.revokeObjectURL(one), 60_000);
const image = (id) => kept(images, 40, id, () => address(id), forget);

// Messages

function say(text, how = "") {
  $("status").textContent = text;
  $("status").className = how;
}

function problem(error) {
  const box = $("problem");
  box.replaceChildren(el("span", {}, error?.message));
  box.hidden = !error;
  $("record").removeAttribute("aria-busy");
  if (!error) return;
  say(error.unsaved || error.gone || error.status >= 400 ? "Not saved" : "", "bad");
  if (error.changed) box.append(el("button", { type: "button", on: { click: reload } }, "Open the file anew"));
  box.append(el("button", { type: "button", on: { click: () => problem(null) } }, "Close this message"));
}

async function attempt(work) {
  if (state.busy) return;
  state.busy = true;
  try {
    await work();
  } catch (error) {
    problem(error);
  } finally {
    state.busy = false;
  }
}

// Moving

const length = () => state.queue?.length ?? state.info.records ?? 0;
const placeAt = (at) => (state.queue ? state.queue[at] : at);

async function show(at) {
  const mine = ++asked;
  if (!length()) {
    state.view = null;
    $("record").replaceChildren(el("section", {}, "No record is like that. Change the filter."));
    $("progress").textContent = "0 records";
    return;
  }
  at = Math.max(0, Math.min(at, length() - 1));
  const view = await record(placeAt(at));
  if (mine !== asked) return; // another one was asked for in the meantime
  Object.assign(state, { at, view, editing: false, since: performance.now() });
  draw();
  window.scrollTo(0, 0);
  // A field that was entered in the meantime keeps the keys.
  if (!document.activeElement.matches("input, textarea, select")) $("record").focus({ preventScroll: true });
  for (let next = at + 1; next <= at + AHEAD && next < length(); next++) {
    record(placeAt(next)).then((found) => found.images.forEach((one) => one.id && image(one.id).catch(() => {})), () => {});
  }
}

const move = (by) => {
  if (by > 0 && state.at + by >= length()) return say("This is the last one of these records.");
  return show(state.at + by).catch(problem);
};

async function jumpTo(place) {
  if (!Number.isInteger(place) || place < 0) return;
  const at = state.queue ? state.queue.indexOf(place) : place;
  if (at < 0 || at >= length()) {
    problem(new Error(`Record ${place + 1} is not among these records. Show all to reach it.`));
    return;
  }
  $("record").focus();
  await show(at);
}

async function filter() {
  const form = new FormData($("filters"));
  const wanted = new URLSearchParams();
  for (const [name, value] of form) if (name !== "jump" && (value || name === "state")) wanted.set(name, value.replace(/^=/, ""));
  const all = wanted.get("state") === "all" && wanted.get("order") === "file" && [...wanted].length === 2;
  say("Looking for records", "busy");
  const mine = ++filtered;
  const found = new Uint32Array(await (await ask(`/api/queue?${wanted}`)).arrayBuffer());
  if (mine !== filtered) return; // another filter was chosen in the meantime
  records.clear(); // others may have decided
  state.queue = all ? null : found;
  state.info.records = all ? found.length : state.info.records;
  problem(null);
  await show(0);
  $("record").removeAttribute("aria-busy");
  say(`${found.length.toLocaleString("en")} records`);
}

function filterSoon(wait) {
  clearTimeout(filterTimer);
  $("record").setAttribute("aria-busy", "true");
  filterTimer = setTimeout(() => filter().catch(problem), wait);
}

async function poll() {
  try {
    tell(await json("/api/state"));
  } catch { /* the next request will tell */ }
  if (!state.info.facets || !state.info.counted) setTimeout(poll, 500);
}

function tell(info) {
  Object.assign(state.info, info);
  $("file").textContent = info.file;
  document.title = `${info.file}: mpo review`;
  const box = $("facets");
  if (info.facets && !box.childElementCount) {
    for (const [name, values] of Object.entries(info.facets)) {
      const menu = el("select", { name, on: { change: () => filterSoon(0) } }, el("option", { value: "" }, "all"));
      // "=" marks a value, so that an empty one is not all.
      for (const [value, count] of values) menu.append(el("option", { value: `=${value}` }, `${value || "none"} (${count})`));
      box.append(el("label", {}, `${name[0].toUpperCase()}${name.slice(1)} `, menu));
    }
  }
  progress();
}

function progress() {
  const total = length().toLocaleString("en");
  const number = state.view ? (state.at + 1).toLocaleString("en") : "0";
  $("progress").textContent = `${number} of ${total}, ${state.info.decided ?? 0} decided by ${state.info.reviewer ?? ""}`;
}

async function reload() {
  await attempt(async () => {
    records.clear();
    images.clear();
    $("facets").replaceChildren();
    tell(await json("/api/reload", {}));
    poll();
    problem(null);
    await filter();
  });
}

// Drawing a record

const keyOf = (part) => JSON.stringify(part.paths);

function written(part) { // what an edit made of a text, here or saved
  const draft = drafts.get(state.view.key)?.get(keyOf(part));
  if (draft !== undefined) return draft;
  const saved = state.view.decision?.edits?.find((one) => JSON.stringify(one.paths) === keyOf(part));
  const own = saved ? saved.value : part.text ?? part.value;
  return Array.isArray(own) ? own.map(String) : String(own ?? "");
}

const original = (part) => part.text ?? part.value;
const isEdited = (part) => part.paths?.length > 0 && JSON.stringify(written(part)) !== JSON.stringify(original(part));

function field(part, name) {
  const value = written(part);
  const lines = Array.isArray(value);
  const keep = (given) => {
    const own = drafts.get(state.view.key) ?? new Map();
    own.set(keyOf(part), lines ? given.split("\n").filter((line) => line.trim()) : given);
    drafts.set(state.view.key, own);
    say("Not saved yet", "busy");
  };
  if (part.of) {
    const menu = el("select", { "aria-label": name, on: { change: (event) => keep(event.target.value) } });
    for (const one of new Set([value, ...part.of])) menu.append(el("option", { value: one, selected: one === value }, one || "none"));
    return menu;
  }
  const text = lines ? value.join("\n") : value;
  const rows = Math.min(MAX_DRAFT_ROWS, text.split("\n").length + Math.floor(text.length / 90) + 1);
  const label = lines ? `${name}, one a line` : name;
  return el("textarea", { value: text, rows, spellcheck: false, "aria-label": label, on: { input: (event) => keep(event.target.value) } });
}

function partNode(part, name) {
  if (part.file) return el("span", { className: "chip" }, part.file);
  if (state.editing && part.paths.length) return field(part, name);
  const node = rendered(written(part), state.raw);
  if (isEdited(part)) node.classList.add("edited");
  return node;
}

function turnNodes(turns, name, title) {
  return turns.flatMap((turn, at) => {
    const parts = turn.parts.map((part, place) => partNode(part, `${name}, ${turn.role} ${at + 1}.${place + 1}`));
    return turn.role && (turns.length > 1 || title) ? [el("h3", {}, turn.role), ...parts] : parts;
  });
}

const onlyText = (completion) => completion.turns.flatMap((turn) => turn.parts.filter((part) => part.text !== undefined));

function completionNode(completion, title, shown) {
  const name = state.hidden ? "" : completion.name;
  const about = completion.details.flatMap((part) => detailNode(part, `${title}: ${part.name}`));
  for (const [key, value] of Object.entries(completion.about ?? {})) about.push(el("dt", {}, key), el("dd", {}, asText(value)));
  const named = name !== title && el("span", { className: ["chosen", "rejected"].includes(name) ? name : "" }, name);
  return el(
    "section",
    { "aria-label": title },
    el("div", { className: "side-title" }, el("h2", {}, title), named),
    ...(shown ? [shown] : turnNodes(completion.turns, title, completion.turns.length > 1)),
    about.length && el("dl", {}, ...about),
  );
}

function detailNode(part, name) {
  const value = written(part);
  if (!state.editing && (value === "" || value.length === 0) && !isEdited(part)) return [];
  const text = Array.isArray(value) ? value.join("\n") : value;
  const shown = state.editing ? field(part, name) : rendered(text, state.raw || Array.isArray(value));
  if (isEdited(part)) shown.classList.add("edited");
  return [el("dt", {}, part.name), el("dd", {}, shown)];
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));
const isPair = (view) => view.kind === "pair" && view.completions.length === 2 && view.completions[0].name === "chosen";

function sidesOf(view) { // the completions, the left one first
  return isPair(view) && view.left === "rejected" ? [view.completions[1], view.completions[0]] : view.completions;
}

function draw() {
  const view = state.view;
  if (!view) return;
  const note = (text, more) => el("p", { className: "note", ...more }, text);
  const about = [["record", view.where], ["id", view.id], ["kind", view.kind]].filter(([, value]) => value);
  const sides = sidesOf(view);
  let shown = [];
  if (sides.length === 2 && state.diff && !state.editing) {
    const texts = sides.map((one) => onlyText(one).map(written).join("\n\n"));
    const marks = sides.map((one) => (state.hidden || !isPair(view) ? "chosen" : one.name));
    shown = difference(...texts).map((parts, at) => compared(parts, marks[at]));
  }
  const details = view.details.flatMap((part) => detailNode(part, part.name));
  const nodes = [
    el("div", { className: "meta" }, ...about.map(([key, value]) => el("span", {}, `${key} `, el("strong", {}, value)))),
    view.bad && note(`This line is not a record: ${view.bad} Reject or skip it.`),
    view.decision && note(decisionText(view.decision, "You"), { id: "decision" }),
    view.disagreeing && note("You disagree. The next decision on this record settles it for all.", { id: "disagreeing" }),
    view.settled && note(`Settled. ${decisionText(view.settled, view.settled.by)}`),
    ...view.others.map((one) => note(decisionText(one, one.by), { className: "note other" })),
    gallery(view),
    view.turns.length && el("section", { "aria-label": view.kind === "conversation" ? "Conversation" : "Prompt" }, ...turnNodes(view.turns, "Prompt", true)),
    sides.length && el("div", { className: sides.length > 1 ? "sides" : "" }, ...sides.map((one, at) => completionNode(one, isPair(view) ? ["Left", "Right"][at] : one.name, shown[at]))),
    details.length && el("section", { "aria-label": "Details" }, el("dl", {}, ...details)),
    Object.keys(view.about).length && el("details", { className: "card" }, el("summary", {}, "Other fields"), el("pre", {}, JSON.stringify(view.about, null, 1))),
  ];
  $("record").replaceChildren(...nodes.filter(Boolean));
  actions();
  progress();
  if (document.activeElement !== $("jump")) $("jump").value = view.place + 1;
}

function decisionText(one, by) {
  const edits = one.edits?.length ? `, with ${one.edits.length} edit${one.edits.length > 1 ? "s" : ""}` : "";
  return `${by}: ${one.action}${edits}${one.reason ? `, ${one.reason}` : ""} (${one.at.slice(0, 16).replace("T", " ")} UTC)`;
}

function gallery(view) {
  const failed = (one, why) => el("p", { className: "note" }, `${one.name}: ${why}`);
  return el("div", { className: view.images.length > 2 ? "gallery many" : "gallery" }, ...view.images.map((one, at) => {
    if (!one.id) return failed(one, one.failed);
    const shown = el("img", { alt: one.name });
    const button = el("button", { type: "button", "aria-label": `Zoom ${one.name}`, on: { click: () => zoom(at) } }, shown);
    image(one.id).then((address) => { shown.src = address; }, (error) => button.replaceWith(failed(one, error.message)));
    return button;
  }));
}

// Deciding

function edits(view) {
  const parts = [...view.turns, ...view.completions.flatMap((one) => one.turns)].flatMap((turn) => turn.parts);
  const all = [...parts, ...view.details, ...view.completions.flatMap((one) => one.details)];
  return all.filter(isEdited).map((part) => ({ paths: part.paths, value: written(part) }));
}

const newUid = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
let pending = null; // a decision whose answer did not come: asked again it is the same one

function decide(action, more = {}) {
  const view = state.view;
  if (!view) return;
  if (action === "swap" && !isPair(view)) return say("Only pairs can be swapped.");
  return attempt(async () => {
    const own = action === "accept" || action === "swap" ? edits(view) : [];
    const content = { place: view.place, key: view.key, base: view.base, action, edits: own, hidden: state.hidden, settle: view.disagreeing, ...more };
    const same = pending && JSON.stringify(pending.content) === JSON.stringify(content);
    pending = same ? pending : { content, uid: newUid() };
    say("Saving", "busy");
    let info;
    try {
      info = await json("/api/decide", { ...content, uid: pending.uid, seconds: (performance.now() - state.since) / 1000 });
    } catch (error) {
      if (error.record) { // decided elsewhere: show how it is now
        pending = null;
        records.set(view.place, Promise.resolve(error.record));
        await show(state.at);
      }
      throw error;
    }
    pending = null;
    if (["accept", "swap"].includes(action)) drafts.delete(view.key); // else they are not in what was saved
    records.delete(view.place);
    tell(info);
    problem(null);
    say(`Saved: ${action}`);
    // Others' labels are shown after one's own: stay where the reviewers disagree.
    const stays = $("filters").elements.state.value === "disagreeing" && !content.settle;
    await show(state.at + (stays ? 0 : 1));
  });
}

function better(side) {
  if (!state.view || !isPair(state.view)) return;
  decide(sidesOf(state.view)[side].name === "chosen" ? "accept" : "swap");
}

function askReason() {
  if (!state.view) return;
  $("reason").value = "";
  $("rejecting").showModal();
  $("reason").focus();
}

function undo() {
  return attempt(async () => {
    const info = await json("/api/undo", { undoes: state.info.undo ?? "" });
    records.delete(info.place);
    tell(await json("/api/state"));
    problem(null);
    if (info.place >= 0) {
      const at = state.queue ? state.queue.indexOf(info.place) : info.place;
      if (at < 0) {
        state.queue = null;
        $("filters").reset();
      }
      await show(at < 0 ? info.place : at);
    }
    say("Undone");
  }).then(async () => {
    if (!$("problem").hidden) tell(await json("/api/state").catch(() => state.info)); // the last decision, as another tab made it
  });
}

function edit() {
  if (!state.view || state.view.bad) return;
  state.editing = !state.editing;
  draw();
  if (state.editing) $("record").querySelector("textarea, select")?.focus();
}

function toggle(name) {
  state[name] = !state[name];
  draw();
}

const ACTIONS = [
  ["a", "Accept", () => decide("accept")],
  ["s", "Swap", () => decide("swap"), { pair: true }],
  ["1", "Left is better", () => better(0), { pair: true }],
  ["2", "Right is better", () => better(1), { pair: true }],
  ["e", "Edit", edit, { pressed: () => state.editing }],
  ["r", "Reject", askReason],
  ["k", "Skip", () => decide("skip")],
  ["u", "Undo", undo],
  ["p", "Previous", () => move(-1)],
  ["n", "Next", () => move(1)],
  ["d", "Diff", () => toggle("diff"), { two: true, pressed: () => state.diff }],
  ["m", "As written", () => toggle("raw"), { pressed: () => state.raw }],
  ["b", "Hide which is chosen", () => toggle("hidden"), { pair: true, pressed: () => state.hidden }],
  ["z", "Zoom", () => zoom(0), { image: true }],
  ["i", "Report", report],
  ["?", "Keys", help],
];

function actions() {
  const view = state.view;
  const shown = ACTIONS.filter(([, , , when = {}]) => (!when.pair || isPair(view)) && (!when.two || view.completions.length === 2) && (!when.image || zoomable().length));
  $("actions").replaceChildren(...shown.map(([key, name, work, when = {}]) => {
    const label = name === "Accept" && state.editing ? "Save and accept" : name;
    const button = el("button", { type: "button", "aria-keyshortcuts": key, on: { click: work } }, label, el("kbd", { "aria-hidden": "true" }, key));
    if (when.pressed) button.setAttribute("aria-pressed", when.pressed());
    return button;
  }));
}

// Dialogs

function told(title, ...nodes) {
  $("told-title").textContent = title;
  $("told-body").replaceChildren(...nodes);
  $("told").showModal();
}

function help() {
  const more = [["Ctrl+Enter", "save what is edited, and accept"], ["Esc", "leave a text or a dialog"], ["/", "search"], ["g", "go to a record"], ["f", "filter"], ["← →", "previous, next"]];
  const rows = [...ACTIONS.map(([key, name]) => [key, name]), ...more];
  told("Keys", el("dl", {}, ...rows.flatMap(([key, name]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, name)])));
}

async function report() {
  try {
    const { rows } = await json("/api/report");
    told("Report", el("dl", {}, ...rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])));
  } catch (error) {
    problem(error);
  }
}

const zoomState = { at: 0, scale: 1 };
const zoomable = () => state.view?.images.filter((one) => one.id) ?? [];

function zoom(at) {
  if (!zoomable().length) return;
  zoomState.at = Math.max(0, zoomable().indexOf(state.view.images[at]));
  if (!$("zoomed").open) $("zoomed").showModal();
  return drawZoom();
}

async function drawZoom() {
  const shown = zoomable();
  zoomState.at = (zoomState.at + shown.length) % shown.length;
  const one = shown[zoomState.at];
  const node = el("img", { alt: one.name, draggable: false });
  $("zoomed-name").textContent = `${one.name} (${zoomState.at + 1} of ${shown.length})`;
  $("zoom-before").hidden = $("zoom-after").hidden = shown.length < 2;
  $("stage").replaceChildren(node);
  $("stage").focus();
  try {
    node.src = await image(one.id);
    await node.decode();
    zoomState.scale = Math.min($("stage").clientWidth / node.naturalWidth, $("stage").clientHeight / node.naturalHeight, 4);
    scale(1);
  } catch (error) {
    $("stage").replaceChildren(el("span", {}, error.message));
  }
}

function scale(by) {
  const node = $("stage").querySelector("img");
  if (!node) return;
  zoomState.scale = Math.min(16, Math.max(0.05, zoomState.scale * by));
  node.width = Math.max(1, Math.round(node.naturalWidth * zoomState.scale));
}

const nextImage = (by) => { zoomState.at += by; drawZoom(); };

// Keys

document.addEventListener("keydown", (event) => {
  if ($("zoomed").open) {
    const work = { "+": () => scale(1.25), "=": () => scale(1.25), "-": () => scale(0.8), z: () => $("zoomed").close(), n: () => nextImage(1), p: () => nextImage(-1) }[event.key];
    if (work && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      work();
    }
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    return decide("accept");
  }
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "Escape") {
    if (typing) $("record").focus();
    else if (state.editing) edit();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat && !["n", "p", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const moves = { "/": () => $("search").focus(), g: () => { $("jump").focus(); $("jump").select(); }, f: () => $("filters").elements.state.focus(), ArrowRight: () => move(1), ArrowLeft: () => move(-1) };
  const work = moves[event.key] ?? ACTIONS.find(([key, , , when = {}]) => key === event.key && (!when.two || state.view?.completions.length === 2))?.[2];
  if (work) {
    event.preventDefault();
    work();
  }
});

function start() {
  for (const [name, values] of [["state", STATES], ["order", ORDERS]]) {
    const menu = $("filters").elements[name];
    menu.append(...values.map((value) => el("option", { value }, value)));
    menu.addEventListener("change", () => filterSoon(0));
  }
  $("search").addEventListener("input", () => filterSoon(400));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    if (event.target === $("jump")) jumpTo(Number($("jump").value) - 1).catch(problem);
    else filterSoon(0);
  });
  REASONS.forEach((reason) => $("reasons").append(el("button", { type: "button", on: { click: () => { $("reason").value = reason; $("reason").focus(); } } }, reason)));
  $("reason").addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      $("rejecting").close("reject");
    }
  });
  $("rejecting").addEventListener("close", () => {
    if ($("rejecting").returnValue === "reject") decide("reject", { reason: $("reason").value });
    $("rejecting").returnValue = "";
  });
  const zooming = { in: () => scale(1.25), out: () => scale(0.8), before: () => nextImage(-1), after: () => nextImage(1), close: () => $("zoomed").close() };
  for (const [name, work] of Object.entries(zooming)) $(`zoom-${name}`).addEventListener("click", work);
  $("stage").addEventListener("wheel", (event) => { event.preventDefault(); scale(event.deltaY < 0 ? 1.1 : 0.9); }, { passive: false });
  $("stage").addEventListener("pointermove", (event) => { if (event.buttons & 1) $("stage").scrollBy(-event.movementX, -event.movementY); });
  addEventListener("beforeunload", (event) => { if ([...drafts.values()].some((own) => own.size)) event.preventDefault(); });
  addEventListener("focus", () => { // a decision may have been made in another tab
    json("/api/state").then(tell, () => {});
  });
  json("/api/state").then(async (info) => {
    tell(info);
    await show(0);
    say("Ready");
    if (info.unmatched) problem(new Error(`${info.unmatched} decisions are about records that this file does not have any more. They stay in the log.`));
    poll();
  }).catch(problem);
}

start();
