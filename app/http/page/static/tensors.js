// The form of a model of tensors, from its metadata: a shape and values for each input, sent as the Open Inference
// Protocol wants them. Any task can be asked so.

import * as answers from './answers.js';
import { html, number } from './dom.js';
import { Missing, json } from './requests.js';

// More is not for typing.
const MOST_TYPED = 512;
const MOST_ELEMENTS = 200_000;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const FILLS = {
  zeros: () => '0',
  ones: () => '1',
  random: (float) => (float ? (Math.random() * 2 - 1).toFixed(4) : String(Math.floor(Math.random() * 2))),
};

/** The form, which asks for the metadata by itself. */
export function tensorForm(model) {
  const fields = html('div', { class: 'fields' }, html('p', { class: 'muted' }, 'Asking for the model’s inputs.'));
  const path = `v2/models/${encodeURIComponent(model.name)}`;
  let inputs = null;
  const prepare = async (written) => {
    try {
      const response = await fetch(path);
      const found = await response.json();
      if (!response.ok) throw new Error(found.error);
      inputs = found.inputs.map((spec, index) => new Input(spec, index));
      fields.replaceChildren(...inputs.map((input) => input.element));
    } catch (error) {
      fields.replaceChildren(html('p', { class: 'problem' }, `The model’s inputs are not known: ${error.message}`));
    }
    written();
  };
  const request = () => {
    if (!inputs) throw new Missing('The model’s inputs are not known yet.');
    // By hand, so that large integers keep every digit.
    return json(`${path}/infer`, `{"inputs":[${inputs.map((input) => input.json()).join(',')}]}`, answers.tensors);
  };
  return { element: fields, request, prepare };
}

class Input {
  constructor(spec, index) {
    this.spec = spec;
    this.bytes = spec.datatype === 'BYTES';
    this.float = /^(FP|BF)/.test(spec.datatype);
    this.sizes = spec.shape.map((size, axis) => (size >= 0 ? null : html('input', {
      type: 'number', min: '1', value: '1', 'aria-label': `${spec.name}: size of axis ${axis + 1}`,
    })));
    const shape = spec.shape.map((size, axis) => [axis ? ' × ' : null, this.sizes[axis] ?? String(size)]).flat().filter(Boolean);
    this.fill = html('select', { id: `fill-${index}` },
      ...['typed', ...Object.keys(FILLS)].map((each) => html('option', { value: each }, each === 'typed' ? 'as typed' : each)));
    this.values = html('textarea', { id: `values-${index}`, rows: '3', spellcheck: 'false', 'aria-label': `Values of ${spec.name}` });
    this.hint = html('span', { class: 'muted' });
    this.element = html('fieldset', { class: 'tensor' },
      html('legend', {}, html('strong', {}, spec.name), ` ${spec.datatype} `),
      html('p', { class: 'shape' }, 'Shape ', shape, ' ', this.hint),
      this.bytes ? null : html('p', { class: 'field row' }, html('label', { for: `fill-${index}` }, 'Values'), this.fill),
      this.values);
    this.follow(true);
    for (const size of this.sizes.filter(Boolean)) size.addEventListener('input', () => this.follow(true));
    this.fill.addEventListener('change', () => this.follow(false));
  }

  shape() {
    const shape = this.spec.shape.map((size, axis) => (this.sizes[axis] ? Number(this.sizes[axis].value) : size));
    if (!shape.every((size) => Number.isInteger(size) && size >= 0)) throw new Missing(`${this.spec.name}: every size is a whole number.`);
    return shape;
  }

  /** A tensor of another size has other values; those that are too many to type are filled in. */
  follow(resized) {
    let count;
    try {
      count = this.shape().reduce((all, size) => all * size, 1);
    } catch {
      return;
    }
    this.hint.textContent = `· ${number(count)} ${count === 1 ? 'value' : 'values'}`;
    if (this.bytes) {
      if (resized) this.values.value = Array.from({ length: Math.min(count, MOST_TYPED) }, () => 'a text').join('\n');
      return;
    }
    if (resized) this.fill.value = count > MOST_TYPED ? 'random' : 'typed';
    if (resized && count <= MOST_TYPED) this.values.value = Array.from({ length: count }, () => FILLS.random(this.float)).join(', ');
    this.values.hidden = this.fill.value !== 'typed';
  }

  json() {
    const { name, datatype } = this.spec;
    const shape = this.shape();
    const count = shape.reduce((all, size) => all * size, 1);
    if (count > MOST_ELEMENTS) throw new Missing(`${name}: ${number(count)} values are too many for this page.`);
    const data = this.data(count);
    if (data.length !== count) throw new Missing(`${name}: expected ${number(count)} values, found ${number(data.length)}.`);
    return `{"name":${JSON.stringify(name)},"shape":[${shape}],"datatype":"${datatype}","data":[${data.join(',')}]}`;
  }

  data(count) {
    const written = (value) => (this.spec.datatype === 'BOOL' ? String(Number(value) !== 0) : value);
    if (this.bytes) return this.values.value.split('\n').map((line) => JSON.stringify(line));
    if (this.fill.value !== 'typed') return Array.from({ length: count }, () => written(FILLS[this.fill.value](this.float)));
    return this.values.value.split(/[\s,[\]]+/).filter(Boolean).map((word) => {
      const value = { true: '1', false: '0' }[word.toLowerCase()] ?? word;
      if (!NUMBER.test(value)) throw new Missing(`${this.spec.name}: ${word} is no number.`);
      // JSON has no sign before a positive number, and no number that begins with a point.
      return written(/^-?(0|[1-9])/.test(value) && !/\.(e|$)/i.test(value) ? value : String(Number(value)));
    });
  }
}
