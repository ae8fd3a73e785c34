// Small charts of the last minutes: one line each, drawn as SVG from the points that the page has seen.

import { html, svg } from './dom.js';

const WIDTH = 240;
const HEIGHT = 56;
const WINDOW = 5 * 60 * 1000;
const NARROWEST = 60 * 1000;
// Between points that are further apart nobody looked.
const GAP = 7000;

export class Chart {
  /** title, what it is of in a sentence; read(point): its number, or null; words(number): how that is written;
   * least: the smallest top of the scale; kind: a class. */
  constructor({ title, help, read, words, least, kind = '' }) {
    Object.assign(this, { title, read, words, least });
    this.value = html('p', { class: 'chart-value' }, '–');
    this.top = html('p', { class: 'chart-top muted' });
    this.area = svg('path', { class: 'area' });
    this.line = svg('path', { class: 'line' });
    this.picture = svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img' },
      svg('path', { class: 'floor', d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }), this.area, this.line);
    this.element = html('figure', { class: `chart ${kind}`, title: help },
      html('figcaption', {}, title), this.value, this.top, this.picture);
    this.points = [];
    this.picture.addEventListener('pointermove', (event) => this.point(event));
    this.picture.addEventListener('pointerleave', () => this.show(this.points.at(-1)));
  }

  /** Points of one server, oldest first, each with its `time`. */
  draw(points, now) {
    this.points = points;
    this.now = now;
    this.width = Math.max(NARROWEST, now - (points[0]?.time ?? now));
    const highest = Math.max(...points.map(this.read), 0);
    const top = Math.max(this.least, highest);
    this.line.setAttribute('d', this.path(top, false));
    this.area.setAttribute('d', this.path(top, true));
    this.top.textContent = highest > 0 ? `most ${this.words(highest)}` : '';
    this.show(points.at(-1));
    this.picture.setAttribute('aria-label', `${this.title}: now ${this.value.textContent}, most ${this.words(highest)}`);
  }

  show(point) {
    const found = point ? this.read(point) : null;
    this.value.textContent = found === null ? '–' : this.words(found);
  }

  /** Shows the number under the pointer. */
  point(event) {
    const box = this.picture.getBoundingClientRect();
    const time = this.now - this.width * (1 - (event.clientX - box.left) / box.width);
    const far = (point) => Math.abs(point.time - time);
    if (this.points.length) this.show(this.points.reduce((best, each) => (far(each) < far(best) ? each : best)));
  }

  path(top, closed) {
    const parts = [];
    let part = null;
    let last = -Infinity;
    for (const point of this.points) {
      const found = this.read(point);
      if (found === null || point.time - last > GAP) part = null;
      if (found !== null) {
        if (!part) parts.push(part = []);
        const x = WIDTH * (1 - (this.now - point.time) / this.width);
        part.push([x, HEIGHT - 1 - (HEIGHT - 4) * (found / top)].map((each) => each.toFixed(1)));
        last = point.time;
      }
    }
    return parts.map((each) => {
      const line = `M${each.map((at) => at.join(' ')).join('L')}`;
      return closed ? `${line}L${each.at(-1)[0]} ${HEIGHT}L${each[0][0]} ${HEIGHT}Z` : line;
    }).join('');
  }
}

/** What of `points` is still in a chart. */
export function recent(points, now) {
  return points.filter((point) => now - point.time <= WINDOW);
}
