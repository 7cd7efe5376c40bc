// One task at a time: a pair, its words, its right answers. Each click is kept before the next.
import { about, picture, post } from "./server.js";

const at = id => document.getElementById(id);
const VIEWS = ["pair", "words", "answers", "done"];
const STEPS = { pair: "1 of 3: reference and target", words: "2 of 3: the words", answers: "3 of 3: all right answers", done: "" };
let task = null;
let remarked = 0; // of the remarks that are waited for, the last

const asked = (path, more = {}) =>
  post(`/api/${path}`, JSON.stringify({ annotator: at("annotator").value, review: at("review").checked, ...more }));

function say(text, wrong = false) {
  at("said").textContent = text;
  at("said").className = wrong ? "error" : "";
}
async function act(path, more) {
  try {
    document.body.classList.add("busy");
    const answer = await asked(path, more);
    say("");
    if (answer.task) draw(answer.task);
    told(answer.progress);
    return answer;
  } catch (error) {
    say(error.message, true);
    return null;
  } finally {
    document.body.classList.remove("busy");
  }
}
function told({ queries, begun }) {
  at("step").textContent = [STEPS[task?.view] ?? "", `${queries} finished`, begun ? `${begun} begun` : ""]
    .filter(Boolean).join(" · ");
}

// the views -------------------------------------------------------------------------------------

function photo(one, side) {
  const image = new Image();
  image.src = picture(one.id, side);
  image.alt = one.name;
  return image;
}
function figure(id, one, caption) {
  const under = document.createElement("figcaption");
  under.textContent = `${caption}: ${one.name}`;
  at(id).replaceChildren(photo(one, "large"), under);
}
function tiles(section, does) {
  const list = section.querySelector(".photos");
  list.replaceChildren(...task.candidates.map(one => {
    const tile = document.createElement("li"), button = document.createElement("button");
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.textContent = "✓";
    button.type = "button";
    button.dataset.id = one.id;
    button.title = one.name;
    if ("fits" in one) button.setAttribute("aria-pressed", one.fits);
    button.append(photo(one, "small"));
    button.addEventListener("click", () => does(one, button));
    tile.append(button, mark);
    return tile;
  }));
  list.querySelector("button")?.focus();
}
function draw(next) {
  task = next;
  for (const view of VIEWS) at(view).hidden = view !== task.view;
  scrollTo(0, 0);
  if (task.view === "pair") {
    figure("pair_reference", task.reference, "reference");
    tiles(at("pair"), one => act("pair", { reference: task.reference.id, target: one.id }));
  } else if (task.view === "words") {
    figure("words_reference", task.reference, "reference");
    figure("words_target", task.target, "target");
    at("concept").value = task.concept;
    at("caption").value = task.caption;
    prefixed();
    remark();
    at("concept").focus();
  } else if (task.view === "answers") {
    figure("answers_reference", task.reference, "reference");
    figure("answers_target", task.target, "target");
    const concept = document.createElement("b"), caption = document.createElement("b");
    concept.textContent = task.concept;
    caption.textContent = task.caption;
    at("sentence").replaceChildren("Unlike the provided image, I want a photo of ", concept, " that ", caption);
    for (const box of at("aspects").querySelectorAll("input")) box.checked = false;
    tiles(at("answers"), judge);
  } else {
    at("sentence_done").textContent = task.sentence;
  }
}
async function judge(one, button) {
  const fits = button.getAttribute("aria-pressed") !== "true";
  const answer = await act("judge", { query: task.query, photo: one.id, fits });
  if (answer) {
    one.fits = answer.fits;
    button.setAttribute("aria-pressed", answer.fits);
  }
}
function prefixed() {
  at("prefix").textContent = task.prefix.replace("{concept}", at("concept").value || "…");
}
async function remark() {
  const number = ++remarked, words = { concept: at("concept").value, caption: at("caption").value };
  if (!words.caption.trim()) return at("remarks").replaceChildren();
  try {
    const { remarks } = await asked("remarks", { query: task.query, ...words });
    if (number !== remarked) return; // an older one
    at("remarks").replaceChildren(...remarks.map(said => {
      const item = document.createElement("li");
      item.textContent = said;
      return item;
    }));
  } catch (error) {
    say(error.message, true);
  }
}
const finish = () => act("finish", {
  query: task.query, aspects: [...at("aspects").querySelectorAll("input:checked")].map(box => box.value),
});
const skip = () => act("skip", { reference: task.reference.id });
const save = () => act("word", { query: task.query, concept: at("concept").value, caption: at("caption").value });
const drop = () => act("drop", { query: task.query });

const many = (count, one, more) => `${count} ${count === 1 ? one : more}`;

async function measured(path) {
  const found = await act(path);
  if (!found) return;
  at("measured").textContent = [
    `${many(found.queries, "query", "queries")}, ${many(found.answers, "right answer", "right answers")}`,
    found.found === null ? "" : `an estimated ${(100 * found.found).toFixed(1)} % of all that there are`,
    found.kappa === null ? "" : `agreement (kappa) ${found.kappa.toFixed(2)}`,
    found.where ? `written to ${found.where}` : "",
  ].filter(Boolean).join(", ");
}

// keys and buttons ------------------------------------------------------------------------------

at("skip").addEventListener("click", skip);
at("finish").addEventListener("click", finish);
at("undo").addEventListener("click", drop);
at("drop").addEventListener("click", drop);
at("measure").addEventListener("click", () => measured("measure"));
at("export").addEventListener("click", () => measured("export"));
at("review").addEventListener("change", () => act("next"));
at("annotator").addEventListener("change", () => {
  history.replaceState(null, "", `#${encodeURIComponent(at("annotator").value)}`);
  act("next");
});
at("saying").addEventListener("submit", event => { event.preventDefault(); save(); });
at("concept").addEventListener("input", prefixed);
for (const id of ["concept", "caption"]) at(id).addEventListener("change", remark);
at("help").addEventListener("click", () => at("keys").showModal());
at("enough").addEventListener("click", () => at("keys").close());
at("large").addEventListener("click", () => at("large").close());

function beside(tile, key) {
  const all = [...tile.closest("ol").querySelectorAll("button")], i = all.indexOf(tile);
  const row = all.filter(one => one.offsetTop === all[0].offsetTop && one.closest("li").offsetTop === all[0].closest("li").offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[key];
  return all[i + step];
}
document.addEventListener("keydown", event => {
  if (at("large").open) {
    event.preventDefault();
    return at("large").close();
  }
  const typing = event.target.closest("input, textarea");
  if (event.key === "Enter" && event.ctrlKey && task?.view === "words") return save();
  if (at("keys").open || event.ctrlKey || event.metaKey || event.altKey || (typing && typing.type !== "checkbox")) return;
  const tile = event.target.closest(".photos button");
  if (event.key.startsWith("Arrow")) {
    const to = tile ? beside(tile, event.key) : document.querySelector("section:not([hidden]) .photos button");
    if (to) { event.preventDefault(); to.focus(); }
  } else if (event.key === "v" && tile) {
    at("image").src = picture(tile.dataset.id, "large");
    at("caption_large").textContent = tile.title;
    at("large").showModal();
  } else if (event.key === "s" && task?.view === "pair") skip();
  else if (event.key === "f" && task?.view === "answers") finish();
  else if (event.key === "?") at("keys").showModal();
});

async function begin() {
  try {
    const said = await about();
    at("library").textContent = `${said.photos} photos of ${said.folder}; candidates by ${said.methods.join(", ")}`;
    at("annotator").value = decodeURIComponent(location.hash.slice(1)) || said.annotator;
    at("aspects").append(...said.aspects.map(name => {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", value: name });
      label.append(box, ` ${name.replaceAll("_", " ")}`);
      return label;
    }));
    await act("next");
  } catch (error) {
    say(error.message, true);
  }
}
begin();
