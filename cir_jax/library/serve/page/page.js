// The query on the left, what was found on the right; the address holds the query.
import { about, picture, post } from "./server.js";
import { masked } from "./mask.js";

const at = id => document.getElementById(id);
const K = 24;

let library; // what the server says about itself
let references = []; // { id, name, weight }
let mask = null; // { id, strokes }, of the only reference
let moved = {}; // controls that are not as the method has them
let results = [];
let shown = []; // those whose pictures may be enlarged, and which is
let opened = 0;
let asking = null; // to break off the query that is waited for

function element(tag, name, ...children) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  e.append(...children);
  return e;
}
function button(text, does, name) {
  const e = element("button", name, text);
  e.type = "button";
  e.addEventListener("click", does);
  return e;
}
function say(text, wrong = false, where = "said") {
  at(where).textContent = text;
  at(where).className = wrong ? "error" : "";
}
const tell = (text, wrong) => say(text, wrong, "taken"); // of references
const chosen = () => library.methods.find(one => one.name === at("method").value);
const takes = what => chosen().takes.includes(what);

// the query -------------------------------------------------------------------------------------

function slider(label, value, { low, high, step }, changed) {
  const range = element("input"), out = element("output", "", String(value));
  Object.assign(range, { type: "range", min: low, max: high, step });
  range.value = value;
  range.addEventListener("input", () => {
    out.textContent = String(+range.value);
    changed(+range.value);
  });
  return element("label", "slider", label, out, range);
}
function choice(label, value, choices, changed) {
  const select = element("select");
  select.append(...choices.map(one => new Option(one, one)));
  select.value = value;
  select.addEventListener("input", () => changed(+select.value));
  return element("label", "", label, select);
}
function drawControls() {
  const { controls } = chosen();
  moved = Object.fromEntries(Object.entries(moved).filter(([name]) => name in controls));
  at("controls").replaceChildren(...Object.entries(controls).map(([name, one]) => {
    const value = moved[name] ?? one.default;
    const changed = now => {
      if (now === one.default) delete moved[name];
      else moved[name] = now;
    };
    const made = one.choices.length
      ? choice(one.label, value, one.choices, changed) : slider(one.label, value, one, changed);
    made.querySelector("input, select").name = name;
    return made;
  }));
  at("ask").querySelector(".negative").hidden = !takes("negative");
  drawReferences();
}
function drawReferences() {
  const several = references.length > 1, { weight: most } = library.most;
  if (references.length !== 1) mask = null;
  at("references").replaceChildren(...references.map((one, i) => {
    const image = new Image();
    image.src = picture(one.id, several ? "small" : "large");
    image.alt = one.name;
    const rest = element("div", "", element("p", "", one.name));
    if (several) {
      const range = { low: -most / 2, high: most / 2, step: .1 };
      rest.append(slider("weight", one.weight, range, now => { one.weight = now; }));
    }
    const does = element("p", "buttons");
    if (!several && takes("mask")) {
      does.append(button(mask ? "Mask drawn: change" : "Draw a mask", drawMask, "mask"));
      if (mask) does.append(button("No mask", () => { mask = null; changedReferences(); }));
    }
    does.append(button("Remove", () => { references.splice(i, 1); changedReferences(); }));
    rest.append(does);
    return element("div", several ? "reference" : "reference alone", image, rest);
  }));
  at("drop").classList.toggle("small", references.length > 0);
  at("drop").hidden = references.length >= library.most.images;
}
function changedReferences() {
  drawReferences();
  if (results.length) search();
}
function refer(one, more = false) {
  const known = references.some(({ id }) => id === one.id);
  if (more && known) return;
  mask = null;
  tell("");
  references = more && takes("images") ? [...references, { weight: 1, ...one }] : [{ weight: 1, ...one }];
  drawReferences();
}
async function drawMask() {
  try {
    const drawn = await masked(references[0].id, mask?.strokes);
    if (!drawn) return;
    mask = { ...await post("/api/pictures", drawn.png), strokes: drawn.strokes };
    drawReferences();
    await search();
  } catch (error) {
    tell(error.message, true);
  }
}
async function upload(files) {
  for (const file of files) {
    if (file.size > library.most.bytes) {
      tell(`${file.name} is too large: at most ${library.most.bytes / 1e6} MB are taken.`, true);
      return;
    }
    tell(`reading ${file.name || "the photo"} ...`);
    try {
      const { id } = await post("/api/pictures", file);
      refer({ id, name: file.name || "a pasted photo" }, references.length > 0);
      tell("");
    } catch (error) {
      tell(error.message, true);
      return;
    }
  }
  at("text").focus();
}
function query() {
  const said = {
    method: chosen().name,
    text: at("text").value.trim(),
    images: references.map(({ id, weight }) => ({ id, weight })),
    controls: moved,
    k: +at("k").value || K,
    explain: at("explain").checked,
  };
  const negative = at("negative").value.trim();
  if (negative && takes("negative")) said.negative = [negative];
  if (mask && takes("mask")) said.mask = mask.id;
  for (const name of ["under", "after"]) if (at(name).value.trim()) said[name] = at(name).value.trim();
  if (at("min_score").value !== "") said.min_score = +at("min_score").value;
  return said;
}

// the address -----------------------------------------------------------------------------------

function address(said) {
  const all = new URLSearchParams();
  if (said.method !== library.methods[0].name) all.set("method", said.method);
  for (const { id, weight } of said.images) all.append("image", weight === 1 ? id : `${id}:${weight}`);
  if (said.text) all.set("text", said.text);
  if (said.negative) all.set("not", said.negative[0]);
  for (const [name, value] of Object.entries(said.controls)) all.set(name, value);
  for (const name of ["mask", "under", "after", "min_score"]) if (name in said) all.set(name, said[name]);
  if (said.k !== K) all.set("k", said.k);
  if (said.explain) all.set("explain", 1);
  return all.size ? `/?${all}` : "/";
}
function restore() {
  const all = new URLSearchParams(location.search);
  const method = all.get("method");
  at("method").value = library.methods.some(one => one.name === method) ? method : library.methods[0].name;
  const before = new Map([...references, ...results].map(one => [one.id, one.name ?? one.path]));
  references = all.getAll("image").slice(0, library.most.images).map(one => {
    const [id, weight] = one.split(":");
    return { id, weight: weight === undefined ? 1 : +weight, name: before.get(id) ?? "" };
  });
  mask = all.has("mask") ? { id: all.get("mask"), strokes: mask?.strokes ?? [] } : null;
  for (const [name, key] of [["text", "text"], ["negative", "not"], ["under", "under"], ["after", "after"],
    ["min_score", "min_score"]]) at(name).value = all.get(key) ?? "";
  at("k").value = all.get("k") ?? K;
  at("explain").checked = all.has("explain");
  moved = {};
  for (const name of Object.keys(chosen().controls)) if (all.has(name)) moved[name] = +all.get(name);
  drawControls();
  drawFiltered();
  if (references.length || at("text").value) search();
  else {
    asking?.abort();
    results = [];
    draw({ explained: {} });
    say("");
  }
}
function drawFiltered() {
  const count = ["under", "after", "min_score"].filter(name => at(name).value).length;
  at("filtered").textContent = count ? ` (${count})` : "";
  if (count) at("filters").open = true;
}

// what was found --------------------------------------------------------------------------------

async function search() {
  const said = query(), where = address(said);
  if (where !== location.pathname + location.search) history.pushState(null, "", where);
  asking?.abort();
  const mine = asking = new AbortController();
  at("found").classList.add("busy");
  say("searching ...");
  try {
    const answer = await post("/api/search", JSON.stringify(said), mine.signal);
    results = answer.results;
    const nameless = references.filter(one => !one.name && answer.names[one.id]);
    for (const one of nameless) one.name = answer.names[one.id];
    if (nameless.length) drawReferences();
    draw(answer);
    const count = results.length === 1 ? "1 photo" : `${results.length} photos`;
    const told = [`${results.length ? count : "No photo"} of ${library.photos}`, `${answer.milliseconds} ms`];
    if (answer.approximate) told.push(answer.approximate);
    say(told.join(" · "));
  } catch (error) {
    if (error.name === "AbortError") return;
    say(error.message, true);
  }
  at("found").classList.remove("busy");
}
function tile(all, i, ...notes) {
  const one = all[i], image = new Image();
  image.src = picture(one.id, "small");
  image.alt = one.path;
  image.loading = "lazy";
  image.draggable = true;
  image.addEventListener("dragstart", event => {
    event.dataTransfer.setData("application/x-cir", JSON.stringify({ id: one.id, name: one.path }));
  });
  const show = button("", () => enlarge(all, i));
  show.append(image);
  show.dataset.id = one.id;
  const use = button("use", () => useAs(one), "as");
  use.title = "use as reference";
  const name = element("span", "name", one.path);
  name.title = one.path;
  return element("li", "tile", show, use, element("p", "", element("b", "", one.score.toFixed(3)), ...notes, name));
}
function place(what, there, here) { // a rank by something else than the whole query
  const e = element("span", there > here ? "up" : there && there < here ? "down" : "same",
    ` ${what} ${there || "–"}`);
  e.title = there ? `${what}: rank ${there}; here ${here}` : `${what}: not ranked`;
  return e;
}
function draw({ explained }) {
  at("found").replaceChildren(...results.map((one, i) => {
    const notes = Object.entries(explained).map(([name, alone]) => place(name, alone.ranks[i], i + 1));
    return tile(results, i, ...notes);
  }));
  const parts = Object.entries(explained).map(([name, alone]) => {
    const tiles = alone.found.map((one, i) => {
      const now = element("span", one.now && one.now <= i + 1 ? "up" : "down", ` now ${one.now || "–"}`);
      return tile(alone.found, i, now);
    });
    return element("div", "", element("h2", "", `By the ${name} alone`), element("ol", "", ...tiles));
  });
  if (parts.length) {
    parts.push(element("p", "faint", "now: its rank in the whole query. Below: its ranks by each alone. " +
      "Together, green went up and orange went down."));
  }
  at("hint").hidden = results.length > 0 || location.search !== "";
  at("explained").replaceChildren(...parts);
  at("explained").hidden = !parts.length;
}
function useAs(one, more = false) {
  if (at("large").open) at("large").close();
  refer({ id: one.id, name: one.path }, more);
  search();
  scrollTo({ top: 0 });
}
function enlarge(all, i) {
  [shown, opened] = [all, i];
  const one = all[i];
  at("image").src = picture(one.id, "large");
  at("image").alt = one.path;
  at("caption").textContent = `${one.path} · ${one.score.toFixed(3)}`;
  at("before").disabled = i === 0;
  at("next").disabled = i === all.length - 1;
  if (!at("large").open) at("large").showModal();
}
const step = by => { if (shown[opened + by]) enlarge(shown, opened + by); };

// what is done ----------------------------------------------------------------------------------

at("ask").addEventListener("submit", event => {
  event.preventDefault();
  search();
});
at("ask").addEventListener("change", event => {
  drawFiltered();
  // texts wait for Enter; what is moved shows at once
  const waits = ["text", "negative", "file", "method"].includes(event.target.id);
  if (!waits && (references.length || at("text").value.trim())) search();
});
at("method").addEventListener("change", () => {
  drawControls();
  if (results.length) search();
});
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    search();
  }
});
at("reset").addEventListener("click", () => {
  history.pushState(null, "", "/");
  restore();
  at("text").focus();
});
at("file").addEventListener("change", () => {
  upload([...at("file").files]);
  at("file").value = "";
});
document.addEventListener("paste", event => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    upload(files);
  }
});
document.addEventListener("dragover", event => {
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", event => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", event => {
  event.preventDefault();
  at("drop").classList.remove("over");
  const own = event.dataTransfer.getData("application/x-cir"), files = [...event.dataTransfer.files];
  if (own) {
    refer(JSON.parse(own), references.length > 0);
    search();
  } else if (files.length) upload(files);
  else tell("Drop a file: addresses are not fetched.", true);
});
window.addEventListener("popstate", restore);
at("before").addEventListener("click", () => step(-1));
at("next").addEventListener("click", () => step(1));
at("use").addEventListener("click", () => useAs(shown[opened]));
at("close").addEventListener("click", () => at("large").close());
at("help").addEventListener("click", () => at("keys").showModal());
at("enough").addEventListener("click", () => at("keys").close());

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("large").open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    if (event.key === "r") useAs(shown[opened]);
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const tiles = [...at("found").querySelectorAll("[data-id]")];
  const here = tiles.indexOf(document.activeElement);
  const columns = tiles.filter(one => one.offsetParent?.offsetTop === tiles[0].offsetParent?.offsetTop).length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (by && tiles.length && (here >= 0 || by > 0)) {
    event.preventDefault();
    tiles[here < 0 ? 0 : Math.min(Math.max(here + by, 0), tiles.length - 1)].focus();
  } else if (event.key === "/") {
    event.preventDefault();
    at("text").focus();
  } else if (event.key === "?") at("keys").showModal();
  else if (event.key === "e") at("explain").click();
  else if (event.key === "m") at("references").querySelector("button.mask")?.click();
  else if ("ra".includes(event.key) && here >= 0) useAs(results[here], event.key === "a");
});

try {
  library = await about();
  at("library").textContent = `${library.photos} photos in ${library.folder}/`;
  at("method").append(...library.methods.map(({ name }) => new Option(name, name)));
  at("methods").hidden = library.methods.length < 2;
  at("folders").append(...library.folders.map(name => new Option(name)));
  restore();
} catch (error) {
  say(error.message, true);
}
