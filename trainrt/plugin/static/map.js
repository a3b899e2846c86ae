// The map of a run: its controls, legend and heat map.
import { Heatmap } from './heatmap.js';
import { choice, el } from './dom.js';
import { legend } from './legend.js';
import { short, steps, title } from './numbers.js';
import { BAND, scaleOf } from './scale.js';
import { decode, STATE } from './wire.js';

const FIRST = ['update_ratio', 'gradient_norm', 'clipped_gradient_norm', 'update_norm', 'weight_norm', 'gradient_ratio',
  'effective_learning_rate', 'unchanged_share', 'rounded_share', 'gradient_zero_share', 'clip_share', 'norm_share',
  'gradient_update_cosine'];

export class MapSection {
  constructor(place, does) {
    this.place = place;
    this.does = does;
    this.heat = new Heatmap('Map of layers and steps', does);
    this.controls = el('div', { class: 'controls' });
    this.legend = el('div', {});
    this.note = el('p', { class: 'unseen', id: 'keys' },
      'Arrow keys move the cursor, Enter chooses the row, plus and minus zoom, Escape shows everything.');
    this.where = el('span', { class: 'range' });
    this.node = el('section', { 'aria-labelledby': 'map-title' },
      el('div', { class: 'bar-head' }, el('h2', { id: 'map-title' }, 'Map'), this.where, this.controls),
      this.legend, this.heat.node, this.note,
      el('p', { class: 'foot' }, 'Drag to zoom, click a row to see it below, Shift adds one. Double click shows everything.'));
  }

  update(run, picture, width, cursor) {
    this.run = run;
    this.picture = picture;
    const { place } = this, rows = run.rows[place.group] || run.rows.layers;
    this.labels = rows.map((row) => row.path);
    this.scale = scaleOf(picture.kind, ...domain(picture));
    const [a, b] = [picture.edges[0], picture.edges[1] - 1];
    const whole = place.first === null;
    this.where.replaceChildren(whole ? steps(a, b) : el('span', {}, steps(a, b), ' ',
      el('button', { type: 'button', class: 'plain', onclick: () => this.does.out() }, 'Show all')));
    this.fill();
    this.legend.replaceChildren(legend(this.scale));
    this.heat.update({
      picture, labels: this.labels, scale: this.scale, width, cursor, show: place.show,
      order: ordered(picture, place.order), chosen: chosen(this.labels, place.rows), marks: marks(run, place),
      describe: (value, state) => describe(picture, value, state),
    });
  }

  fill() {
    const { place, run } = this;
    const names = run.statistics.map((s) => s.name), early = FIRST.filter((n) => names.includes(n));
    const key = JSON.stringify([names.length, Object.keys(run.rows), place.statistic, place.group, place.order, place.show]);
    if (key === this.filled) return;
    this.filled = key;
    const options = [...early, ...names.filter((n) => !early.includes(n))].map((n) => [n, title(n)]);
    const held = this.controls.contains(document.activeElement) ? document.activeElement.getAttribute('aria-label') : null;
    this.controls.replaceChildren(
      choice('Statistic', options, place.statistic, (v) => place.set({ statistic: v })),
      choice('Rows', ['layers', 'weights', 'blocks'].filter((g) => run.rows[g]).map((g) => [g, g]), place.group,
        (v) => this.does.group(v)),
      choice('Order', [['depth', 'by depth'], ['value', 'by value']], place.order, (v) => place.set({ order: v })),
      choice('Show', [['mean', 'mean'], ['low', 'lowest'], ['high', 'highest']], place.show, (v) => place.set({ show: v })));
    if (held) this.controls.querySelector(`[aria-label="${held}"]`)?.focus();
  }
}

// Rows that a list of paths means: the row itself, or the layers and blocks that own it, or what it owns.
export function chosen(labels, paths) {
  const wanted = new Set();
  for (const path of paths) {
    const same = labels.indexOf(path);
    if (same >= 0) { wanted.add(same); continue; }
    labels.forEach((label, i) => { if (path.startsWith(`${label}/`) || label.startsWith(`${path}/`)) wanted.add(i); });
  }
  return wanted;
}

function marks(run, place) {
  return run.findings.flatMap((finding, i) => (finding.steps && finding.severity !== 'info'
    ? [{ first: finding.steps[0], last: finding.steps[1], colour: finding.severity, current: place.finding === i }] : []));
}

export function ordered(picture, order) {
  const rows = Array.from({ length: picture.rows }, (_, i) => i);
  if (order !== 'value') return rows;
  const sums = rows.map((row) => {
    let sum = 0, n = 0;
    for (let c = 0; c < picture.columns; c += 1) {
      const value = decode(picture.arrays.mean[c * picture.rows + row], picture.factor);
      if (Number.isFinite(value)) { sum += value; n += 1; }
    }
    return n ? sum / n : -Infinity;
  });
  return rows.sort((a, b) => sums[b] - sums[a]);
}

// The range of colours: from the 1st to the 99th percentile of the means, so that one odd cell does not bleach the rest.
export function domain(picture) {
  const codes = picture.arrays.mean.filter((code) => Math.abs(code) < 32500).sort();
  if (!codes.length) return [0, 1];
  const at = (p) => codes[Math.round(p * (codes.length - 1))] / picture.factor;
  return [at(0.01), at(0.99)];
}

export function describe(picture, value, state) {
  if (state === STATE.zero) return picture.kind === 'ratio' ? 'exactly zero: it did not move' : 'exactly zero';
  const text = picture.kind === 'share' ? `${Number((value * 100).toPrecision(3))} %` : short(value);
  const broken = state === STATE.nonfinite ? ' (has NaN or infinite elements)' : '';
  if (picture.kind !== 'ratio') return `${text}${broken}`;
  const at = Math.log10(value);
  const word = Number.isNaN(at) ? '' : at < BAND[0] ? ', too low' : at > BAND[1] ? ', too high' : ', fine';
  return `${text}${word}${broken}`;
}
