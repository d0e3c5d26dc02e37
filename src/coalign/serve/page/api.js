// The REST API. A failure becomes an Error whose message is a sentence for the reader.

const UNREACHABLE = "The server does not respond. Check that coalign serve is still running, then try again.";

async function respond(path, body) {
  const options = { headers: { Accept: "application/json, image/png" } };
  if (body) options.method = "POST";
  if (body instanceof FormData) options.body = body;
  else if (body) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(`api/${path}`, options);
  } catch {
    throw new Error(UNREACHABLE);
  }
  if (response.ok) return response;
  const reason = await response.json().catch(() => ({}));
  throw new Error(reason.error || `The server could not complete the request (status ${response.status}).`);
}

/** GET without a body, else POST: a FormData as multipart, an object as JSON. */
export const request = async (path, body) => (await respond(path, body)).json();
export const requestImage = async (path, body) => (await respond(path, body)).blob();

const answers = new Map();

/** As `request` with an object, but remembers the last answers, so that going back is immediate. Failures are not kept. */
export function remembered(name, path, body) {
  if (!answers.has(name)) {
    const answer = request(path, body);
    answer.catch(() => answers.delete(name));
    answers.set(name, answer);
    if (answers.size > 40) answers.delete(answers.keys().next().value);
  }
  return answers.get(name);
}
