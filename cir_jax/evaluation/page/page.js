"use strict";
// All that is shown is in the page: `content` (see page/__init__.py) and the lines of `pictures-N`.
const at = id => document.getElementById(id);
const { group: GROUP, missed: MISSED, sections } = JSON.parse(at("content").textContent);
const PAGE = 25;
const EDGES = [1, 5, 10, 50, 100, 500, 1000, 5000, 10000, 50000, Infinity]; // last rank of each bar

let section; // the benchmark that is looked at
let found = []; // its queries that pass the filters, in order
let page = 0; // of `found`
let bar = null; // the chosen bar, or null
let tiles = [], opened = 0; // those of the query whose image is enlarged

function element(tag, name, ...children) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  e.append(...children);
  return e;
}
function options(id, pairs) {
  const before = at(id).value;
  at(id).replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  if (pairs.some(([value]) => value === before)) at(id).value = before;
  at(id).parentElement.hidden = pairs.length < 2;
}

// pictures: lines of base64, split when one of their group is shown
const groups = new Map();
function picture(number) {
  const group = Math.floor(number / GROUP);
  if (!groups.has(group)) groups.set(group, at("pictures-" + group).textContent.split("\n"));
  const line = groups.get(group)[number % GROUP];
  return line[0] === "=" ? picture(+line.slice(1)) : "data:image/webp;base64," + line;
}

// the view: what the controls say
function view() {
  const a = +at("method").value, b = at("beside").value === "" ? null : +at("beside").value;
  return { a, b, k: +at("right").value, runs: b === null || b === a ? [a] : [a, b] };
}
const best = (query, method) => query.best[method];
const outcomes = {
  right: (q, v) => best(q, v.a) <= v.k,
  wrong: (q, v) => best(q, v.a) > v.k,
  won: (q, v) => best(q, v.a) <= v.k && best(q, v.b) > v.k,
  lost: (q, v) => best(q, v.a) > v.k && best(q, v.b) <= v.k,
};
function solved(query, k) { // by the image alone, by the text alone
  return ["image_only", "text_only"].map(name => {
    const i = section.methods.indexOf(name);
    return i >= 0 && best(query, i) <= k;
  });
}
const modalities = {
  one: ([image, text]) => image || text,
  image: ([image]) => image,
  text: ([, text]) => text,
  neither: ([image, text]) => !image && !text,
};
const byId = (a, b) => a.id - b.id;
const orders = {
  worst: v => (a, b) => best(b, v.a) - best(a, v.a) || byId(a, b),
  best: v => (a, b) => best(a, v.a) - best(b, v.a) || byId(a, b),
  ahead: v => (a, b) => (best(b, v.b) - best(b, v.a)) - (best(a, v.b) - best(a, v.a)) || byId(a, b),
  behind: v => (a, b) => (best(b, v.a) - best(b, v.b)) - (best(a, v.a) - best(a, v.b)) || byId(a, b),
  id: () => byId,
  category: () => (a, b) => a.category.localeCompare(b.category) || byId(a, b),
};

function choices() { // of controls that depend on the methods
  const v = view(), names = section.methods, a = names[v.a], b = v.runs.length > 1 && names[v.b];
  const outcome = [["", "all"], ["right", a + " right"], ["wrong", a + " wrong"]];
  const sort = [["id", "id"]];
  if (section.labelled) sort.unshift(["worst", "worst rank first"], ["best", "best rank first"]);
  if (b) {
    outcome.push(["won", `${a} right, ${b} wrong`], ["lost", `${a} wrong, ${b} right`]);
    if (section.labelled) sort.push(["ahead", `${a} most ahead`], ["behind", `${a} most behind`]);
  }
  if (section.queries.some(q => q.category)) sort.push(["category", "category"]);
  options("outcome", section.labelled ? outcome : []);
  options("sort", sort);
}

function filter() {
  const v = view(), words = at("words").value.toLowerCase().split(/\s+/).filter(x => x);
  const category = at("category").value, aspect = at("aspect").value;
  const outcome = outcomes[at("outcome").value], modality = modalities[at("alone").value];
  const passed = section.queries.filter(q =>
    words.every(w => q.words.includes(w) || String(q.id) === w) &&
    (!category || q.category === category) && (!aspect || q.aspects.includes(aspect)) &&
    (!outcome || outcome(q, v)) && (!modality || modality(solved(q, v.k))));
  if (section.labelled) histogram(passed, v);
  found = passed.filter(q => bar === null || barOf(best(q, v.a)) === bar);
  found.sort(orders[at("sort").value](v));
}
const barOf = rank => EDGES.findIndex(edge => rank <= edge);

function histogram(queries, v) {
  const count = section.bars; // as many as the worst rank of any method needs
  const counts = v.runs.map(m => {
    const row = new Array(count).fill(0);
    for (const q of queries) row[barOf(best(q, m))]++;
    return row;
  });
  const most = Math.max(1, ...counts.flat());
  at("bars").replaceChildren(...counts[0].map((_, i) => {
    const from = i ? EDGES[i - 1] + 1 : 1, last = EDGES[i];
    const range = last === Infinity ? from + "+" : from === last ? `${from}` : `${from}–${last}`;
    const pair = element("div", "pair", ...counts.map((row, j) => {
      const e = element("div", j ? "bar second" : "bar");
      e.style.height = row[i] ? Math.max(2, 100 * row[i] / most) + "%" : "0";
      return e;
    }));
    const numbers = counts.map(row => row[i]);
    const button = element("button", "", pair, numbers.join(" / "), element("br"), range);
    button.type = "button";
    button.ariaPressed = String(bar === i);
    button.ariaLabel = `rank ${range}: ` +
      v.runs.map((m, j) => `${numbers[j]} of ${section.methods[m]}`).join(", ");
    button.onclick = () => {
      bar = bar === i ? null : i;
      draw();
      at("bars").children[i].focus(); // it was drawn anew
    };
    return button;
  }));
  at("whose").replaceChildren(...v.runs.flatMap((m, j) =>
    [element("span", j ? "key second" : "key"), section.methods[m]]));
}

// one query
function tile(query, kind, image, note, what) {
  const [number, name] = section.images[image], picked = new Image();
  picked.decoding = "async";
  picked.src = picture(number);
  picked.alt = what;
  const e = element("button", "tile " + kind, picked, note);
  e.type = "button";
  e.title = `${what} · ${name}`;
  e.onclick = () => enlarge(e);
  return Object.assign(e, { query, caption: e.title, src: picked.src });
}
function run(query, method) {
  const own = query.found[method], name = section.methods[method], line = element("div", "tiles");
  own.top.forEach((image, i) => {
    const hit = query.targets.includes(image), score = own.scores[i].toFixed(3);
    const what = `${name}, place ${i + 1}${hit ? ", a ground truth" : ""}, score ${score}`;
    line.append(tile(query, hit ? "hit" : "other", image, (hit ? "✓ " : "") + score, what));
  });
  const missed = query.targets.map((image, i) => [image, own.ranks[i]])
    .filter(([image]) => !own.top.includes(image)).sort((a, b) => a[1] - b[1]);
  const pictured = missed.filter(([image]) => image >= 0).slice(0, MISSED);
  if (pictured.length) line.append(element("div", "gap"));
  for (const [image, rank] of pictured) {
    line.append(tile(query, "missed", image, "rank " + rank, `ground truth, rank ${rank} of ${name}`));
  }
  const facts = [name];
  const targets = query.targets.length;
  if (section.labelled) facts.push("best rank " + best(query, method));
  if (targets > 1) facts.push(`${targets - missed.length} of ${targets} in the five`);
  if (own.subset !== null) facts.push(`rank ${own.subset} in its image set`);
  return element("section", "run", element("h3", "", facts.join(" · ")), line);
}
function article(query) {
  const words = element("div", "", element("p", "", query.text || "(no text)"));
  const facts = ["query " + query.id, query.category, query.aspects.join(", ")].filter(x => x);
  words.append(element("p", "note", facts.join(" · ")));
  const runs = element("div", "runs", ...view().runs.map(method => run(query, method)));
  const e = element("article", "query", tile(query, "reference", query.reference, "", "reference"),
    words, runs);
  e.tabIndex = -1;
  e.dataset.id = query.id;
  return e;
}

// pages
function pages() { return Math.max(1, Math.ceil(found.length / PAGE)); }
function turn(to) {
  page = Math.min(Math.max(0, to), pages() - 1);
  show();
  document.querySelector(".pager").scrollIntoView();
  at("queries").firstElementChild?.focus({ preventScroll: true });
}
function show() {
  const start = page * PAGE, shown = found.slice(start, start + PAGE);
  at("queries").replaceChildren(...shown.map(article));
  const range = shown.length ? `${start + 1}–${start + shown.length} of ` : "";
  for (const pager of document.querySelectorAll(".pager")) {
    const before = element("button", "", "← previous"), after = element("button", "", "next →");
    before.type = after.type = "button";
    before.disabled = page === 0;
    after.disabled = page >= pages() - 1;
    before.onclick = () => turn(page - 1);
    after.onclick = () => turn(page + 1);
    const all = found.length === section.queries.length ? "" : ` (of ${section.queries.length})`;
    const counts = element("span", "note", `${range}${found.length} queries${all}`);
    counts.setAttribute("role", "status");
    pager.replaceChildren(before, after, counts);
  }
}
function draw() {
  page = 0;
  filter();
  show();
}

// enlarged
function enlarge(button) {
  tiles = [...button.closest(".query").querySelectorAll(".tile")];
  look(tiles.indexOf(button));
  at("large").showModal();
}
function look(to) {
  opened = (to + tiles.length) % tiles.length;
  const one = tiles[opened];
  at("asked").textContent = one.query.text;
  at("image").src = one.src;
  at("image").alt = at("caption").textContent = one.caption;
}
at("before").onclick = () => look(opened - 1);
at("after").onclick = () => look(opened + 1);
at("close").onclick = () => at("large").close();
at("large").onclick = event => { if (event.target === at("large")) at("large").close(); };

// keys
function move(step) {
  const all = [...at("queries").children], now = document.activeElement.closest(".query");
  const to = now ? all.indexOf(now) + step : step > 0 ? 0 : all.length - 1;
  if (all[to]) all[to].focus();
}
const keys = {
  j: () => move(1),
  k: () => move(-1),
  n: () => turn(page + 1),
  p: () => turn(page - 1),
  "/": event => {
    event.preventDefault(); // it would be typed there
    at("words").focus();
  },
  Enter: event => {
    if (!event.target.matches(".query")) return;
    event.preventDefault(); // it would press the button that has the focus then
    enlarge(event.target.querySelector(".runs .tile"));
  },
};
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("large").open) {
    if (event.key === "ArrowLeft") look(opened - 1);
    if (event.key === "ArrowRight") look(opened + 1);
    return;
  }
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") setTimeout(() => event.target.blur()); // once it is emptied
    return;
  }
  const action = keys[event.key];
  if (!action) return;
  action(event);
};

function open(chosen) {
  section = chosen;
  bar = null;
  sections.forEach((one, i) => { at("benchmark-" + i).hidden = one !== section; });
  for (const b of at("names").children) b.ariaPressed = String(b.textContent === section.name);
  for (const e of document.querySelectorAll(".truth")) e.hidden = !section.labelled;
  if (!section.bars) { // seen for the first time
    let worst = 1;
    for (const q of section.queries) {
      q.best = q.found.map(one => Math.min(...one.ranks));
      q.words = (q.text + " " + q.category + " " + q.aspects.join(" ")).toLowerCase();
      worst = section.labelled ? Math.max(worst, ...q.best) : 1;
    }
    section.bars = barOf(worst) + 1;
  }
  const methods = section.methods.map((name, i) => [String(i), name]);
  options("method", methods);
  options("beside", [["", "nothing"], ...methods]);
  at("beside").parentElement.hidden = methods.length < 2;
  options("right", section.labelled ? section.right.map(k => [String(k), k]) : []);
  const alone = ["image_only", "text_only"].some(name => section.methods.includes(name));
  options("alone", !alone || !section.labelled ? [] : [["", "all"], ["one", "one alone is right"],
    ["image", "the image is"], ["text", "the text is"], ["neither", "neither is"]]);
  const kinds = values => {
    const all = [...new Set(values)].filter(x => x).sort();
    return all.length ? [["", "all"], ...all.map(x => [x, x])] : [];
  };
  options("category", kinds(section.queries.map(q => q.category)));
  options("aspect", kinds(section.queries.flatMap(q => q.aspects)));
  reset();
}
function reset() {
  bar = null;
  for (const id of ["outcome", "alone", "category", "aspect", "words", "beside"]) at(id).value = "";
  at("method").value = section.methods.length - 1; // the method; baselines stand before it
  at("right").value = section.usual;
  choices();
  at("sort").value = section.labelled ? "worst" : "id";
  draw();
}
at("view").onreset = event => { event.preventDefault(); reset(); };
at("view").onsubmit = event => event.preventDefault();
at("view").oninput = () => { choices(); draw(); };

if (sections.length) {
  for (const one of sections) {
    const button = element("button", "", one.name);
    button.type = "button";
    button.onclick = () => open(one);
    at("names").append(button);
  }
  at("names").hidden = sections.length < 2;
  at("browser").hidden = false;
  open(sections[0]);
}
