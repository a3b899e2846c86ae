// One chart of lines over steps: the mean as a line, the smallest and largest of each column as a band around it.
import { Axis, draggable, font, surface } from './axis.js';
import { el } from './dom.js';
import { power, short } from './numbers.js';
import { colour } from './theme.js';
import { STATE } from './wire.js';

const TOP = 6, BOTTOM = 8;

export class Chart {
  // `does` as for the heat map: hover(step or null), zoom(first, last), out().
  constructor(name, does, { height = 78, hint = '' } = {}) {
    this.height = height;
    this.name = name;
    this.legend = el('span', { class: 'keys' });
    this.canvas = el('canvas', { role: 'img', 'aria-label': name });
    this.node = el('div', { class: 'chart' },
      el('div', { class: 'head' }, el('h3', {}, name), hint ? el('span', { class: 'hint' }, hint) : null, this.legend), this.canvas);
    draggable(this.canvas, () => this.axis, {
      zoom: does.zoom, click: () => {}, band: (band) => { this.drag = band; this.draw(); },
    });
    this.canvas.addEventListener('pointermove', (event) => {
      if (!this.axis) return;
      const x = event.clientX - this.canvas.getBoundingClientRect().left;
      does.hover(this.axis.holds(x) ? this.axis.step(x) : null);
    });
    this.canvas.addEventListener('pointerleave', () => does.hover(null));
    this.canvas.addEventListener('dblclick', () => does.out());
  }

  // `view`: edges, series [{name, colour, dash, low, mean, high, states, fill}], log, unit ("share"), zone [a, b], width,
  // marks [{step, colour}] of steps to point at.
  update(view) {
    this.view = view;
    const seen = view.series.flatMap((s) => [...s.low, ...s.high, ...s.mean]).filter(Number.isFinite);
    let [low, high] = [Math.min(...spread(seen)), Math.max(...spread(seen))];
    this.level = low === high ? low : null; // a curve that does not move has one label, not the ends of an empty range
    if (view.unit === 'share') [low, high] = [0, Math.max(high, 0.01) > 0.5 ? 1 : Math.max(high * 1.15, 0.01)];
    else if (view.zone) [low, high] = [Math.min(low, view.zone[0] - 0.4), Math.max(high, view.zone[1] + 0.4)];
    else if (view.log && high - low < 0.6) [low, high] = [(low + high) / 2 - 0.3, (low + high) / 2 + 0.3];
    else if (!(high > low)) [low, high] = [low - Math.max(Math.abs(low) * 0.05, 1e-9), high + Math.max(Math.abs(high) * 0.05, 1e-9)];
    this.range = seen.length ? [low, high] : [0, 1];
    this.empty = !seen.length;
    const last = view.series.map((s) => `${s.name}: from ${this.text(s.mean[0])} to ${this.text(s.mean[s.mean.length - 1])}`);
    this.canvas.setAttribute('aria-label', `${this.name}. ${last.join('; ')}`);
    this.draw();
  }

  text(value) {
    if (this.view.unit === 'share') return Number.isNaN(value) ? 'not measured' : `${Number((value * 100).toPrecision(3))} %`;
    return short(this.view.log ? 10 ** value : value);
  }

  draw() {
    if (!this.view) return;
    const { edges, series, width, zone, cursor, marks = [] } = this.view, n = edges.length - 1;
    const axis = (this.axis = new Axis(width, edges[0], edges[n] - 1));
    const context = surface(this.canvas, width, this.height);
    const [low, high] = this.range, tall = this.height - TOP - BOTTOM;
    const y = (value) => TOP + tall - ((Math.max(low, Math.min(high, value)) - low) / (high - low)) * tall;
    context.fillStyle = colour('plot');
    context.fillRect(axis.left, TOP - 4, axis.width, tall + 8);
    if (zone) {
      const a = y(Math.min(zone[1], high)), b = y(Math.max(zone[0], low));
      context.fillStyle = colour('fine');
      if (b > a) context.fillRect(axis.left, a, axis.width, b - a);
    }
    context.font = font(10.5);
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    for (const [value, text] of this.empty ? [] : this.labels()) {
      context.fillStyle = colour('line');
      context.fillRect(axis.left, Math.round(y(value)), axis.width, 1);
      context.fillStyle = colour('soft');
      context.fillText(text, axis.left - 8, y(value));
    }
    const centre = (i) => axis.x((edges[i] + edges[i + 1] - 1) / 2 + 0.5);
    for (const s of series) {
      context.fillStyle = context.strokeStyle = s.colour;
      context.globalAlpha = s.fill ? 0.5 : 0.2;
      strips(n, (i) => Number.isFinite(s.mean[i]) && !Number.isNaN(s.low[i]), (from, to) => {
        context.beginPath();
        for (let i = from; i < to; i += 1) context.lineTo(centre(i), s.fill ? y(s.mean[i]) : y(finite(s.high[i], high)));
        for (let i = to - 1; i >= from; i -= 1) context.lineTo(centre(i), s.fill ? y(s.base ? s.base[i] : low) : y(finite(s.low[i], low)));
        context.fill();
      });
      context.globalAlpha = 1;
      context.lineWidth = 1.5;
      context.lineJoin = 'round';
      context.setLineDash(s.dash || []);
      strips(n, (i) => Number.isFinite(s.mean[i]), (from, to) => {
        context.beginPath();
        for (let i = from; i < to; i += 1) context.lineTo(centre(i), y(s.mean[i]));
        if (to - from === 1) context.lineTo(centre(from) + 2, y(s.mean[from]));
        context.stroke();
      });
      context.setLineDash([]);
      if (s.states) {
        context.fillStyle = colour('nonfinite');
        for (let i = 0; i < n; i += 1) {
          if (s.states[i] === STATE.nonfinite) context.fillRect(axis.x(edges[i]), TOP + tall, Math.max(axis.width / n, 2), 4);
        }
      }
    }
    for (const mark of marks.filter(({ step }) => step >= edges[0] && step < edges[n])) {
      context.fillStyle = mark.colour;
      context.fillRect(Math.round(axis.x(mark.step)), TOP - 4, 1.5, tall + 8);
      context.fillRect(Math.round(axis.x(mark.step)) - 2, TOP - 4, 6, 4);
    }
    if (this.drag) {
      context.fillStyle = colour('accent');
      context.globalAlpha = 0.18;
      context.fillRect(this.drag[0], TOP - 4, this.drag[1] - this.drag[0], tall + 8);
      context.globalAlpha = 1;
    }
    const at = cursor === null || cursor === undefined ? -1 : column(edges, cursor);
    if (at >= 0) {
      context.fillStyle = colour('ink');
      context.globalAlpha = 0.55;
      context.fillRect(Math.round(axis.x(cursor + 0.5)), TOP - 4, 1, tall + 8);
      context.globalAlpha = 1;
    }
    this.keys(at);
  }

  keys(at) {
    const { series } = this.view;
    const index = at >= 0 ? at : Math.max(0, series[0] ? series[0].mean.findLastIndex(Number.isFinite) : 0);
    this.legend.replaceChildren(...series.map((s) => {
      const mark = el('i', { class: s.dash ? 'key dashed' : 'key' });
      mark.style.color = s.colour;
      return el('span', {}, mark, `${s.name} `, el('b', {}, this.text(s.mean[index])));
    }));
  }

  labels() {
    const [low, high] = this.range;
    if (this.level !== null && this.view.unit !== 'share' && !this.view.zone) return [[this.level, this.text(this.level)]];
    if (!this.view.log) return [low, (low + high) / 2, high].map((v) => [v, this.text(v)]);
    const all = [];
    for (let e = Math.ceil(low); e <= Math.floor(high); e += 1) all.push([e, power(e)]);
    const every = Math.ceil(all.length / 4);
    return all.length > 1 ? all.filter((_, i) => i % every === 0) : [low, high].map((v) => [v, short(10 ** v)]);
  }
}

const finite = (value, other) => (Number.isFinite(value) ? value : other);

function spread(values) { return values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0]; }

export function column(edges, step) {
  const n = edges.length - 1;
  if (step < edges[0] || step >= edges[n]) return -1;
  return Math.min(n - 1, Math.floor(((step - edges[0]) / (edges[n] - edges[0])) * n));
}

// Calls draw(from, to) for each run of columns that holds.
function strips(n, holds, draw) {
  let from = -1;
  for (let i = 0; i <= n; i += 1) {
    if (i < n && holds(i)) { if (from < 0) from = i; } else if (from >= 0) { draw(from, i); from = -1; }
  }
}
