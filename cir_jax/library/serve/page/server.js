// What is asked of the server. Posts carry a number that only this page could read.
let csrf = "";

export async function about() {
  const said = await answered(await reached(fetch("/api/about")));
  csrf = said.csrf;
  return said;
}
export async function post(path, body, signal) {
  const send = () => reached(fetch(path, { method: "POST", body, signal, headers: { "x-cir-jax": csrf } }));
  let answer = await send();
  if (answer.status === 403) { // the server was started anew
    await about();
    answer = await send();
  }
  return answered(answer);
}
async function reached(coming) {
  try {
    return await coming;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `cir serve` still running?");
  }
}
async function answered(answer) {
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}
export const picture = (id, side) => `/pictures/${id}/${side}`;
