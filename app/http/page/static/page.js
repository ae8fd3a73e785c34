// The page: asks /state while it is in view, and shows what it says. Knows no task: forms.js has those.

import { Chart, recent } from './charts.js';
import { copyButton, html, milliseconds, number, percent, say } from './dom.js';
import { mount } from './forms.js';

const EVERY = 2000;
const PATIENCE = 6000;
const at = (id) => document.getElementById(id);
const share = (part, whole) => (whole > 0 ? part / whole : null);
const STATUSES = {
  200: '200 answered', 202: '202 accepted', 400: '400 malformed', 413: '413 too large', 422: '422 invalid', 429: '429 too many rows',
  499: '499 client left', 500: '500 failed', 503: '503 unavailable', 504: '504 too late',
};
// Points by the server they are of: an address may have several behind it.
const servers = new Map();
let timer = 0;
let mounted = '';
let heard = 0;
let announced = '';

const CHARTS = [
  { title: 'Requests', help: 'Inference requests answered in a second, refusals among them.',
    read: (p) => p.requests, words: (n) => `${number(n)} /s`, least: 1 },
  { title: 'Latency', help: 'Mean time in the server of requests that the model answered.',
    read: (p) => p.latency, words: milliseconds, least: 1 },
  { title: 'Refused', help: 'Requests refused or given up in a second: invalid, queue full, too late, draining.',
    read: (p) => p.refused, words: (n) => `${number(n)} /s`, least: 1, kind: 'refused' },
  { title: 'In flight', help: 'Inference requests that are not answered yet.',
    read: (p) => p.inFlight, words: (n) => number(n), least: 4 },
  { title: 'Rows waiting', help: 'Rows that wait for a runner.',
    read: (p) => p.queue, words: (n) => number(n), least: 4 },
  { title: 'Rows in a batch', help: 'Mean rows of a run of the model.',
    read: (p) => p.batch, words: (n) => number(n), least: 2 },
  { title: 'Padding', help: 'Share of computed tokens that only fill shorter rows up.',
    read: (p) => p.padding, words: percent, least: 0.1 },
  { title: 'Runners busy', help: 'Share of the time that runners spent in runs of the model.',
    read: (p) => p.busy, words: percent, least: 1 },
].map((each) => new Chart(each));

/** What there is to draw between two answers of one server. */
function pointOf(before, state, time) {
  const { totals } = state;
  const seconds = before ? state.clock_seconds - before.clock_seconds : 0;
  const sum = (counts) => Object.values(counts).reduce((all, each) => all + each, 0);
  const more = (read) => (before ? read(totals) - read(before.totals) : 0);
  const answered = more((t) => t.answered);
  const tokens = more((t) => t.tokens) + more((t) => t.padding_tokens);
  return {
    time,
    state,
    requests: share(more((t) => sum(t.requests)), seconds),
    refused: share(more((t) => sum(t.rejected)), seconds),
    latency: answered ? (more((t) => t.seconds) / answered) * 1000 : null,
    inFlight: state.in_flight,
    queue: state.queue_rows,
    batch: share(more((t) => t.rows), more((t) => t.runs)),
    padding: share(more((t) => t.padding_tokens), tokens),
    // A run is counted when it ends, also what of it was before.
    busy: state.model && seconds ? Math.min(1, more((t) => t.runner_busy_seconds) / (seconds * state.model.runners)) : null,
  };
}

/** Stage in a word, what kind of news that is, and a sentence where there is something to say. */
function showStage(word, kind, notice = '') {
  const stage = at('stage');
  stage.textContent = word;
  stage.dataset.kind = kind;
  at('notice').hidden = !notice;
  at('notice').textContent = notice;
  at('notice').dataset.kind = kind;
  // Once for each change: a reader of the screen need not hear every answer.
  if (announced && announced !== word) say(`The server is ${word}. ${notice}`);
  announced = word;
}

function stageOf(state) {
  if (state.stuck) return ['stuck', 'bad', `No progress: ${state.stuck}.`];
  if (state.stage === 'ready') return ['ready', 'good'];
  if (state.stage === 'draining') {
    return ['draining', 'waiting', 'This server is ending. What it accepted is still answered; new requests go to others.'];
  }
  return [state.stage, 'waiting', `Not ready yet: ${state.stage}. Requests are refused with 503 until every check is passed.`];
}

function show(state) {
  const now = Date.now();
  const key = `${state.replica} ${state.started_unix_seconds}`;
  const seen = servers.get(key) ?? [];
  const points = recent([...seen, pointOf(seen.at(-1)?.state, state, now)], now);
  servers.set(key, points);
  for (const [each, held] of servers) if (!recent(held, now).length) servers.delete(each);
  showStage(...stageOf(state));
  showModel(state.model);
  showFacts(state);
  for (const chart of CHARTS) chart.draw(points, now);
  showCounts(state.totals);
  at('software').textContent = `${state.server} ${state.server_version}`;
}

function showModel(model) {
  if (!model || mounted === model.digest) return;
  mounted = model.digest;
  at('name').textContent = model.name;
  at('version').textContent = `version ${model.version}`;
  document.title = `${model.name} · model server`;
  mount(model, at('forms'), at('answer'));
}

function showFacts(state) {
  const { model } = state;
  const digest = model && html('code', { title: model.digest }, model.digest.slice(0, 16));
  const facts = model
    ? [
        ['Task', model.task],
        ['Runs on', `${model.provider.toUpperCase()}, ${model.precision}`],
        ['Runners', `${model.runners}, each with up to ${number(model.max_batch_rows)} rows`],
        ['Queue', `${number(state.queue_rows)} of ${number(model.max_queue_rows)} rows`],
        ['In flight', number(state.in_flight)],
        model.max_tokens ? ['Window', `${number(model.max_tokens)} tokens of a text`] : null,
        ['Digest', [digest, copyButton('Copy', () => model.digest, digest)]],
      ]
    : [];
  const others = servers.size > 1 ? ` (${servers.size} have answered here)` : '';
  facts.push(['Replica', `${state.replica}${others}`]);
  if (state.started_unix_seconds) facts.push(['Up since', new Date(state.started_unix_seconds * 1000).toLocaleString('en-GB')]);
  const wanted = facts.filter(Boolean);
  const list = at('facts');
  // A new button would lose its focus, so only what changed is made anew.
  const written = JSON.stringify(wanted.map(([term, found]) => [term, typeof found === 'string' ? found : model.digest]));
  if (list.dataset.written === written) return;
  list.dataset.written = written;
  const old = new Map([...list.querySelectorAll('dt')].map((term) => [term.textContent, term.parentElement]));
  list.replaceChildren(...wanted.map(([term, found]) => {
    const row = old.get(term) ?? html('div', {}, html('dt', {}, term), html('dd', {}));
    if (typeof found === 'string') row.lastChild.textContent = found;
    else if (row.dataset.of !== model.digest) row.lastChild.replaceChildren(...found);
    if (typeof found !== 'string') row.dataset.of = model.digest;
    return row;
  }));
}

/** Requests by status, and refusals among them by reason. */
function showCounts(totals) {
  const lines = (counts, word) => Object.entries(counts).sort()
    .map(([name, count]) => html('div', {}, html('dt', {}, word(name)), html('dd', {}, number(count))));
  const requests = lines(totals.requests, (status) => STATUSES[status] ?? `Status ${status}`);
  const rejected = lines(totals.rejected, (reason) => `of these ${reason.replaceAll('_', ' ')}`);
  at('counts').replaceChildren(...(requests.length ? [...requests, ...rejected] : [html('div', {}, html('dt', {}, 'None yet'), html('dd', {}))]));
}

function showSilence(words) {
  const since = heard ? ` since ${new Date(heard).toLocaleTimeString('en-GB')}` : '';
  showStage('not answering', 'bad', `${words}${since}. Asking again every ${EVERY / 1000} seconds; what is below is from before.`);
}

async function ask() {
  clearTimeout(timer);
  try {
    const response = await fetch('state', { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE) });
    if (response.ok) {
      show(await response.json());
      heard = Date.now();
    } else {
      showSilence(`The server answered ${response.status}, and no state`);
    }
  } catch {
    showSilence('No answer');
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(ask, EVERY);
}

document.addEventListener('visibilitychange', () => (document.hidden ? clearTimeout(timer) : ask()));
at('charts').replaceChildren(...CHARTS.map((chart) => chart.element));
ask();
