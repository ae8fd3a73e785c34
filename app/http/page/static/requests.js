// One request to the model: made, sent, and as a curl command. Its content is in its body, never in its address.

import { showAnswer, showProblem, showRefusal } from './answers.js';

/** The request as it stands, or what is missing. */
export function attempt(parts) {
  try {
    return { request: parts.request() };
  } catch (error) {
    if (!(error instanceof Missing)) throw error;
    return { problem: error.message };
  }
}

/** Something that has to be given first; its message says what. */
export class Missing extends Error {}

/** Sends the request and shows what came of it; its status, 0 without one. */
export async function exchange(model, request, key, answer) {
  const headers = { 'content-type': request.type };
  if (key) headers.authorization = `Bearer ${key}`;
  const started = performance.now();
  let response;
  let body;
  try {
    response = await fetch(request.path, { method: 'POST', headers, body: request.body, cache: 'no-store' });
    body = await response.text();
  } catch {
    showProblem(answer, 'No answer: the server ended the connection, or is not there.');
    return 0;
  }
  const total = performance.now() - started;
  let found;
  try {
    found = JSON.parse(body);
  } catch {
    showProblem(answer, `The answer with status ${response.status} is no JSON.`);
    return response.status;
  }
  if (response.ok) showAnswer(answer, request.show(found, model), response.headers, total);
  else showRefusal(answer, response, found);
  return response.status;
}

/** A request with a JSON body. show(answer, model): elements, and the answer in a few words. */
export function json(path, content, show) {
  return { path, type: 'application/json', body: typeof content === 'string' ? content : JSON.stringify(content), show };
}

/** The request as a command for a shell. The key stays out of it. */
export function curlOf(request, withKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const data = typeof request.body === 'string'
    ? `--data-raw ${quoted(request.body.length > 4000 ? '…' : request.body)}`
    : `--data-binary @${quoted(request.body.name)}`;
  return ['curl', quoted(new URL(request.path, location.href).href), '-H', quoted(`content-type: ${request.type}`),
    ...(withKey ? ['-H', '"authorization: Bearer $API_KEY"'] : []), data].join(' ');
}
