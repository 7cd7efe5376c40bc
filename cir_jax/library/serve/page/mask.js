// A region painted over a picture: strokes on a canvas of the picture's large size.
import { picture } from "./server.js";

const at = id => document.getElementById(id);
const canvas = at("mask"), pen = canvas.getContext("2d", { willReadFrequently: true });
let strokes = []; // { erase, width, points: [[x, y], ...] } in pixels of the canvas
let drawing = null; // the one under the pointer
let finish = null; // told of the mask, or of null

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    (event.clientX - box.x) * canvas.width / box.width,
    (event.clientY - box.y) * canvas.height / box.height,
  ];
}
function draw(context, { erase, width, points }, colour) {
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points) context.lineTo(...point);
  if (points.length === 1) context.lineTo(points[0][0] + .01, points[0][1]);
  context.stroke();
}
function redraw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (const stroke of strokes) draw(pen, stroke, "#e8336d");
  at("undo").disabled = at("clear").disabled = !strokes.length;
  at("done").disabled = !strokes.some(stroke => !stroke.erase);
}
function erasing(on) {
  at("brush").setAttribute("aria-pressed", !on);
  at("erase").setAttribute("aria-pressed", on);
}
function end(mask) {
  if (at("masking").open) at("masking").close();
  finish?.(mask);
  finish = null;
}

canvas.addEventListener("pointerdown", event => {
  if (event.button) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  const scale = canvas.width / canvas.getBoundingClientRect().width;
  const erase = at("erase").getAttribute("aria-pressed") === "true";
  drawing = { erase, width: at("width").value * scale, points: [place(event)] };
  strokes.push(drawing);
  redraw();
});
canvas.addEventListener("pointermove", event => {
  if (!drawing) return;
  const moved = event.getCoalescedEvents?.() ?? [];
  drawing.points.push(...(moved.length ? moved : [event]).map(place));
  redraw();
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => { drawing = null; });
}
at("brush").addEventListener("click", () => erasing(false));
at("erase").addEventListener("click", () => erasing(true));
at("undo").addEventListener("click", () => { strokes.pop(); redraw(); });
at("clear").addEventListener("click", () => { strokes = []; redraw(); });
at("cancel").addEventListener("click", () => end(null));
at("masking").addEventListener("cancel", () => end(null));
at("masking").addEventListener("keydown", event => {
  if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("undo").click();
  }
});
at("done").addEventListener("click", () => {
  const sheet = document.createElement("canvas");
  sheet.width = canvas.width;
  sheet.height = canvas.height;
  const context = sheet.getContext("2d");
  for (const stroke of strokes) draw(context, stroke, "#fff");
  context.globalCompositeOperation = "destination-over"; // black below what is white
  context.fillStyle = "#000";
  context.fillRect(0, 0, sheet.width, sheet.height);
  sheet.toBlob(end, "image/png");
});

// The mask that is drawn over a picture, a PNG; null = none. before: the strokes of the last one.
export async function masked(id, before = []) {
  const image = at("under_mask");
  image.src = picture(id, "large");
  await image.decode();
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  strokes = [...before];
  erasing(false);
  redraw();
  at("masking").showModal();
  canvas.focus();
  const png = await new Promise(resolve => { finish = resolve; });
  return png && { png, strokes };
}
