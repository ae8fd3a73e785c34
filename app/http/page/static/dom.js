// What makes elements and words of numbers. Text becomes text nodes alone, never markup.

const SVG = 'http://www.w3.org/2000/svg';

/** An HTML element with attributes (false and undefined: none) and children, which may be texts. */
export function html(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element, as `html`. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** Says it to who cannot see the page: the one live region. */
export function say(words) {
  document.getElementById('said').textContent = words;
}

/** As many digits as are worth reading. */
export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return '–';
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString('en');
  const rounded = Number(value.toPrecision(digits));
  return Math.abs(rounded) < 0.001 ? '0' : String(rounded);
}

export function percent(share) {
  return `${(share * 100).toFixed(share > 0.9995 || share < 0.0005 ? 0 : 1)} %`;
}

export function milliseconds(value) {
  return value < 1000 ? `${number(value, value < 10 ? 2 : 3)} ms` : `${number(value / 1000)} s`;
}

/** A button that copies what `text()` is. Where the browser lets no page write to the clipboard (plain HTTP), `shown`
 * is selected instead, for the keyboard to copy. */
export function copyButton(label, text, shown) {
  const button = html('button', { type: 'button', class: 'quiet' }, label);
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = 'Copied';
      say('Copied');
    } catch {
      getSelection().selectAllChildren(shown);
      button.textContent = 'Selected: press Ctrl + C';
      say('Selected. Press Control and C to copy.');
    }
    setTimeout(() => { button.textContent = label; }, 2500);
  });
  return button;
}

/** A labelled bar of a share, 0 to 1. */
export function bar(label, share, kind = '') {
  const fill = html('span', { class: `fill ${kind}` });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return html('li', { class: 'bar' },
    html('span', { class: 'bar-label' }, label), html('span', { class: 'track' }, fill),
    html('span', { class: 'bar-value' }, percent(share)));
}
