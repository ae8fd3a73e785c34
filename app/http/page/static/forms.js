// The form of the model's task: what is typed, the request that it makes, the same as a curl command. Texts go into
// bodies alone. answers.js shows what comes back.

import * as answers from './answers.js';
import { copyButton, html } from './dom.js';
import { Missing, attempt, curlOf, exchange, json } from './requests.js';
import { tensorForm } from './tensors.js';

const REVIEWS = [
  'Worth every penny!',
  'It broke after two days.',
  'The parcel came on Tuesday.',
  'Cold soup, but what a dessert.',
  'Never again.',
];
const NAMES = [
  'Ada Lovelace met Charles Babbage in London.',
  'The Danube flows from Donaueschingen to the Black Sea.',
  'Zoë works for the World Health Organization in Geneva.',
];
const LIKENESS = [
  'How do I reset my password?',
  'I cannot sign in any more.',
  'Where is my parcel?',
  'What does shipping cost?',
];

const TASKS = {
  'text-classification': texts('predict', 'text', REVIEWS, answers.labels),
  'text-regression': texts('predict', 'text', REVIEWS, answers.values),
  'token-classification': texts('predict', 'text', NAMES, answers.entities),
  'text-embedding': () => textForm({
    examples: LIKENESS,
    one: (text) => json('embed', { inputs: text }, (found) => answers.vectors([text], found)),
    many: (lines) => json('embed', { inputs: lines }, (found) => answers.vectors(lines, found)),
  }),
  'text-pair': pairForm,
  'image-classification': imageForm,
};

/** Puts the form for this model into `forms`; its answers come into `answer`. */
export function mount(model, forms, answer) {
  const make = TASKS[model.task] ?? tensorForm;
  const key = html('input', { id: 'key', type: 'password', autocomplete: 'off', spellcheck: 'false' });
  const keyField = html('p', { class: 'field', hidden: true },
    html('label', { for: 'key' }, 'API key'), key);
  const send = html('button', { type: 'submit', class: 'primary' }, 'Send');
  const parts = make(model);
  const command = html('code', {});
  const curl = html('details', { class: 'curl' }, html('summary', {}, 'As a curl command'),
    html('pre', { tabindex: '0', 'aria-label': 'curl command' }, command), copyButton('Copy', () => command.textContent, command));
  const form = html('form', { novalidate: true }, parts.element,
    keyField, html('p', { class: 'actions' }, send, html('span', { class: 'muted hint' }, html('kbd', {}, 'Ctrl'), ' + ', html('kbd', {}, 'Enter'))));

  const write = () => {
    const { request, problem } = attempt(parts);
    command.textContent = problem ? `# ${problem}` : curlOf(request, key.value !== '');
  };
  const submit = async () => {
    const { request, problem } = attempt(parts);
    if (problem) return answers.showProblem(answer, problem);
    send.disabled = true;
    try {
      const status = await exchange(model, request, key.value, answer);
      if (status === 401) {
        keyField.hidden = false;
        key.focus();
      }
    } finally {
      send.disabled = false;
    }
  };
  form.addEventListener('input', write);
  form.addEventListener('change', write);
  form.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    if (!send.disabled) submit();
  });
  parts.onExample?.(() => {
    write();
    form.requestSubmit();
  });
  forms.replaceChildren(form, curl);
  answer.hidden = true;
  parts.prepare?.(write);
  write();
}

/** The form of a task that /predict and /predict/batch serve. */
function texts(path, field, examples, show) {
  return () => textForm({
    examples,
    one: (text) => json(path, { [field]: text }, (found, model) => show([text], [found], model)),
    many: (lines) => json(`${path}/batch`, { [`${field}s`]: lines }, (found, model) => show(lines, found.predictions, model)),
  });
}

/** One text, or one on each line. */
function textForm({ examples, one, many }) {
  const text = html('textarea', { id: 'text', rows: '4', spellcheck: 'false' }, examples[0]);
  const label = html('label', { for: 'text' }, 'Text');
  const several = html('input', { type: 'radio', name: 'how', id: 'several' });
  const single = html('input', { type: 'radio', name: 'how', id: 'single', checked: true });
  let go = () => {};
  const chips = examples.map((example) => {
    const chip = html('button', { type: 'button', class: 'chip' }, example);
    chip.addEventListener('click', () => {
      text.value = example;
      single.checked = true;
      follow();
      go();
    });
    return chip;
  });
  const all = html('button', { type: 'button', class: 'chip' }, `All ${examples.length} at once`);
  all.addEventListener('click', () => {
    text.value = examples.join('\n');
    several.checked = true;
    follow();
    go();
  });
  const follow = () => {
    label.textContent = several.checked ? 'Texts, one a line' : 'Text';
    text.rows = several.checked ? 8 : 4;
  };
  for (const each of [single, several]) each.addEventListener('change', follow);
  const element = html('div', { class: 'fields' },
    html('fieldset', { class: 'switch' }, html('legend', { class: 'unseen' }, 'How many texts'),
      single, html('label', { for: 'single' }, 'One text'), several, html('label', { for: 'several' }, 'A batch of lines')),
    html('p', { class: 'field' }, label, text),
    html('div', { class: 'chips', role: 'group', 'aria-label': 'Examples' }, ...chips, all));
  const request = () => {
    const lines = text.value.split('\n').filter((line) => line.trim());
    if (!lines.length) throw new Missing('Type a text first.');
    return several.checked ? many(lines) : one(text.value);
  };
  return { element, request, onExample: (then) => { go = then; } };
}

/** A query, and the texts that are ranked by it. */
function pairForm() {
  const query = html('input', { id: 'query', type: 'text', value: 'When was the bridge built?' });
  const text = html('textarea', { id: 'text', rows: '6', spellcheck: 'false' },
    'The bridge over the river was finished in 1894.\nThe river is 300 km long.\nBuilding it took eight years and five engineers.');
  const element = html('div', { class: 'fields' },
    html('p', { class: 'field' }, html('label', { for: 'query' }, 'Query'), query),
    html('p', { class: 'field' }, html('label', { for: 'text' }, 'Texts, one a line'), text));
  const request = () => {
    const lines = text.value.split('\n').filter((line) => line.trim());
    if (!lines.length || !query.value.trim()) throw new Missing('Type a query, and a text on each line.');
    return json('rerank', { query: query.value, texts: lines }, (found) => answers.ranks(lines, found));
  };
  return { element, request };
}

/** A file. */
function imageForm() {
  const input = html('input', { id: 'image', type: 'file', accept: 'image/png,image/jpeg' });
  const preview = html('img', { class: 'preview', alt: 'The chosen image', hidden: true });
  input.addEventListener('change', () => {
    const [file] = input.files;
    preview.hidden = !file;
    if (!file) return;
    const reader = new FileReader();
    reader.addEventListener('load', () => { preview.src = reader.result; });
    reader.readAsDataURL(file);
  });
  const element = html('div', { class: 'fields' },
    html('p', { class: 'field' }, html('label', { for: 'image' }, 'Image, PNG or JPEG'), input), preview);
  const request = () => {
    const [file] = input.files;
    if (!file) throw new Missing('Choose an image first.');
    return { path: 'predict', type: file.type, body: file, show: (found, model) => answers.labels([file.name], [found], model) };
  };
  return { element, request };
}
