"use strict";
const at = id => document.getElementById(id);
let csrf = "";
async function post(path, body) {
  csrf ||= (await (await fetch("/api/about")).json()).csrf;
  const answer = await fetch(path, { method: "POST", body, headers: { "x-cir-jax": csrf } });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}
at("ask").addEventListener("submit", async event => {
  event.preventDefault();
  try {
    const said = await post("/api/search", JSON.stringify({ text: at("text").value }));
    at("said").textContent = `${said.results.length} photos`;
    at("found").replaceChildren(...said.results.map(one => {
      const image = new Image();
      image.src = `/pictures/${one.id}/small`;
      image.alt = one.path;
      return image;
    }));
  } catch (error) {
    at("said").textContent = error.message;
  }
});
