// What comes back: labels and scores as bars, entities in their text, vectors, tensors; how long it took and where that
// went. Each function returns elements, and the answer in a few words for who hears it.

import { bar, html, milliseconds, number, percent, say } from './dom.js';

// Beyond that a browser is slow to show it, and nobody reads it.
const MOST_ROWS = 200;
const MOST_ALIKE = 8;

/** An answer that came; total: milliseconds in the browser. */
export function showAnswer(answer, { elements, words }, headers, total) {
  answer.hidden = false;
  answer.replaceChildren(...elements, timing(headers, total));
  say(`${words}, in ${milliseconds(total)}`);
}

/** A refusal by the server. */
export function showRefusal(answer, response, found) {
  const wait = response.headers.get('retry-after');
  const words = `${response.status}: ${found.error ?? 'no reason given'}.${wait ? ` Come again in ${wait} s.` : ''}`;
  showProblem(answer, words);
}

/** What keeps a request from being sent or answered. */
export function showProblem(answer, words) {
  answer.hidden = false;
  answer.replaceChildren(html('p', { class: 'problem' }, words));
  say(words);
}

/** Where the time went, from `Server-Timing`: waiting for a runner, the model's run, and all else. */
function timing(headers, total) {
  const found = Object.fromEntries([...(headers.get('server-timing') ?? '').matchAll(/(\w+);dur=([\d.]+)/g)]
    .map(([, name, duration]) => [name, Number(duration)]));
  const queue = found.queue ?? 0;
  const run = found.inference ?? 0;
  const parts = [['queue', 'Queue', queue], ['run', 'Run', run], ['rest', 'Network, HTTP, tokens', Math.max(0, total - queue - run)]];
  const segments = parts.map(([kind, , duration]) => {
    const segment = html('span', { class: `segment ${kind}` });
    segment.style.flexGrow = String(duration / total);
    return segment;
  });
  const meta = [headers.get('x-model'), `request ${headers.get('x-request-id')}`].filter(Boolean).join(' · ');
  return html('div', { class: 'timing' },
    html('p', { class: 'timing-total' }, html('strong', {}, milliseconds(total)), ' in this browser'),
    html('div', { class: 'segments', 'aria-hidden': 'true' }, segments),
    html('ul', { class: 'legend' }, parts.map(([kind, name, duration]) => html('li', {},
      html('span', { class: `key ${kind}`, 'aria-hidden': 'true' }), `${name} `, html('strong', {}, milliseconds(duration))))),
    html('p', { class: 'meta muted' }, meta));
}

/** One for each text as a table, or the one by itself. */
function each(texts, found, one, row, heads) {
  if (texts.length === 1) return one(texts[0], found[0]);
  const rows = found.slice(0, MOST_ROWS).map((answer, index) => html('tr', {},
    html('td', { class: 'text' }, texts[index]), row(texts[index], answer).map((cell) => html('td', {}, cell))));
  const table = html('table', {}, html('thead', {}, html('tr', {}, ['Text', ...heads].map((head) => html('th', { scope: 'col' }, head)))),
    html('tbody', {}, rows));
  return { elements: [scrolled(table, 'Answers'), ...rest(found.length)], words: `${found.length} answers` };
}

function scrolled(table, label) {
  return html('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': label }, table);
}

function rest(count) {
  return count > MOST_ROWS ? [html('p', { class: 'muted' }, `and ${number(count - MOST_ROWS)} more`)] : [];
}

function cut(answer) {
  return answer.truncated ? [html('p', { class: 'muted' }, 'The text was longer than the model’s window, and cut.')] : [];
}

function shortBar(share) {
  const fill = html('span', { class: 'fill' });
  fill.style.width = `${share * 100}%`;
  return html('span', { class: 'short' }, html('span', { class: 'track' }, fill), percent(share));
}

/** text-classification and image-classification, one label or several. */
export function labels(texts, found, model) {
  const one = (_, answer) => {
    if (answer.labels) {
      const bars = answer.labels.map((each) => bar(each.label, each.score));
      const none = html('p', { class: 'verdict' }, 'No label is likely enough');
      const words = answer.labels.map((each) => `${each.label} ${percent(each.score)}`).join(', ') || 'no label';
      return { elements: [bars.length ? html('ul', { class: 'bars' }, bars) : none, ...cut(answer)], words };
    }
    const others = model.labels.filter((label) => label !== answer.label);
    const other = others.length === 1 ? others[0] : 'all other labels';
    return {
      elements: [
        html('p', { class: 'verdict' }, answer.label, ' ', html('span', {}, percent(answer.score))),
        html('ul', { class: 'bars' }, bar(answer.label, answer.score), bar(other, 1 - answer.score, 'faint')),
        ...cut(answer),
      ],
      words: `${answer.label}, ${percent(answer.score)}`,
    };
  };
  const row = (_, answer) => (answer.labels
    ? [answer.labels.map((each) => `${each.label} ${percent(each.score)}`).join(', ') || '–']
    : [answer.label, shortBar(answer.score)]);
  return each(texts, found, one, row, found[0].labels ? ['Labels'] : ['Label', 'Score']);
}

/** text-regression. */
export function values(texts, found) {
  const words = ({ value }) => (typeof value === 'number' ? number(value, 4)
    : Object.entries(value).map(([name, held]) => `${name} ${number(held, 4)}`).join(' · '));
  const one = (_, answer) => ({
    elements: [html('p', { class: 'verdict' }, words(answer)), ...cut(answer)], words: words(answer),
  });
  return each(texts, found, one, (_, answer) => [words(answer)], ['Value']);
}

/** token-classification: places count code points, as an array of the text's characters does. */
export function entities(texts, found) {
  const marked = (text, answer) => {
    const characters = [...text];
    const parts = [];
    let at = 0;
    for (const entity of answer.entities) {
      parts.push(characters.slice(at, entity.start).join(''),
        html('mark', { title: percent(entity.score) }, characters.slice(entity.start, entity.end).join(''),
          html('small', {}, entity.entity_group)));
      at = entity.end;
    }
    return [...parts, characters.slice(at).join('')];
  };
  const one = (text, answer) => ({
    elements: [html('p', { class: 'marked' }, marked(text, answer)), ...cut(answer)],
    words: answer.entities.map((entity) => `${entity.word}: ${entity.entity_group}`).join(', ') || 'nothing found',
  });
  const row = (text, answer) => [html('span', {}, marked(text, answer))];
  return each(texts, found, one, row, ['Entities']);
}

/** text-embedding: a vector's first numbers, or how alike several are. */
export function vectors(texts, found) {
  const size = found[0].length;
  if (found.length === 1) {
    const shown = found[0].slice(0, 24).map((value) => number(value, 3)).join(', ');
    return {
      elements: [html('p', { class: 'verdict' }, `${number(size)} dimensions`), html('p', { class: 'numbers' }, `${shown}${size > 24 ? ', …' : ''}`)],
      words: `a vector of ${size} dimensions`,
    };
  }
  const few = found.slice(0, MOST_ALIKE);
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const cosine = (a, b) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b) || 1);
  const head = html('tr', {}, html('th', { scope: 'col' }, 'Cosine'), few.map((_, index) => html('th', { scope: 'col' }, String(index + 1))));
  const rows = few.map((a, index) => html('tr', {}, html('th', { scope: 'row' }, `${index + 1}. ${texts[index]}`),
    few.map((b) => {
      const alike = cosine(a, b);
      const cell = html('td', { class: 'alike' }, alike.toFixed(2));
      cell.style.setProperty('--share', String(Math.max(0, alike)));
      return cell;
    })));
  return {
    elements: [scrolled(html('table', {}, html('thead', {}, head), html('tbody', {}, rows)), 'How alike the texts are')],
    words: `${found.length} vectors of ${size} dimensions`,
  };
}

/** text-pair: best first. */
export function ranks(texts, found) {
  const least = Math.min(0, ...found.map((each) => each.score));
  const most = Math.max(1, ...found.map((each) => each.score));
  const bars = found.map((each) => {
    const line = bar(texts[each.index], (each.score - least) / (most - least));
    line.lastChild.textContent = number(each.score);
    return line;
  });
  return { elements: [html('ul', { class: 'bars long' }, bars)], words: `best: ${texts[found[0].index]}` };
}

/** Outputs of the Open Inference Protocol. */
export function tensors(found) {
  const rows = found.outputs.map((output) => html('tr', {},
    html('th', { scope: 'row' }, output.name), html('td', {}, output.datatype), html('td', {}, output.shape.join(' × ')),
    html('td', { class: 'numbers' }, `${output.data.slice(0, 64).map((value) => (typeof value === 'number' ? number(value, 5) : String(value))).join(', ')}${output.data.length > 64 ? ', …' : ''}`)));
  const head = html('tr', {}, ['Output', 'Datatype', 'Shape', 'Values'].map((each) => html('th', { scope: 'col' }, each)));
  return {
    elements: [scrolled(html('table', {}, html('thead', {}, head), html('tbody', {}, rows)), 'Outputs')],
    words: `${found.outputs.length} outputs`,
  };
}
