// The drill-down: the run's own curves, and those of the chosen layers, all on the steps of the map.
import { Chart } from './chart.js';
import { el } from './dom.js';
import { telemetry, title, words } from './numbers.js';
import { BAND } from './scale.js';
import { colour } from './theme.js';

export const MOST = 6;
const MAIN = ['loss', 'learning_rate'];

// Charts of a layer: what to draw, and the statistics it takes. "!" draws the band of its peak and trough.
export function plan(run) {
  const has = new Set(run.statistics.map((s) => s.name));
  const charts = [
    { name: 'Update / weight', log: true, zone: BAND, hint: 'shaded: where weights usually learn', lines: [['update_ratio', '']] },
    { name: 'Gradient norm', log: true, lines: [['gradient_norm', 'before clip'], ['clipped_gradient_norm', 'after clip', [5, 4]]] },
    { name: 'Update norm', log: true, lines: [['update_norm', '']] },
    { name: 'Weight norm', log: true, lines: [['weight_norm', '']] },
    { name: 'Distance from the start, norm', log: true, lines: [['distance_norm', '']] },
    ...run.slots.map((slot) => ({ name: `Slot: ${words(slot)}, norm`, log: true, lines: [[`${slot}_norm`, '']] })),
    { name: 'Effective learning rate', log: true, hint: 'update / gradient', lines: [['effective_learning_rate', '']] },
    { name: 'Unchanged elements', unit: 'share', hint: 'and why', lines: [['unchanged_share', 'unchanged', null, 'series0'], ['rounded_share', 'rounded away', null, 'series1'],
      ['gradient_zero_share', 'gradient zero', null, 'series2'], ['gradient_nonfinite_share', 'not finite', null, 'nonfinite']] },
  ];
  return charts.map((c) => ({ ...c, lines: c.lines.filter(([s]) => has.has(s)) })).filter((c) => c.lines.length);
}

export function statisticsOf(run) {
  const names = new Set(plan(run).flatMap((chart) => chart.lines.map(([name]) => name)));
  const has = new Set(run.statistics.map((s) => s.name));
  for (const name of [...names]) {
    for (const edge of ['peak', 'trough']) {
      const bound = name.replace(/_norm$/, `_${edge}_norm`);
      if (bound !== name && has.has(bound) && !name.startsWith('clipped')) names.add(bound);
    }
  }
  return [...names];
}

export class Drill {
  constructor(place, does) {
    this.place = place;
    this.does = does;
    this.charts = [];
    this.chips = el('div', { class: 'chips' });
    this.top = el('div', {});
    this.more = el('details', {}, el('summary', {}, 'Timings, norms and telemetry'));
    this.below = el('div', {});
    this.node = el('section', { 'aria-labelledby': 'drill-title' },
      el('div', { class: 'bar-head' }, el('h2', { id: 'drill-title' }, 'Curves')),
      this.top, this.more, el('div', { class: 'bar-head inner' }, el('h2', { class: 'second' }, 'Layers'), this.chips), this.below);
  }

  // Charts are made once for a run and a choice of rows, and then only told what to draw.
  build(run, labels, rows) {
    const key = JSON.stringify([run.name, run.scalars, run.telemetry, run.slots, rows.length]);
    this.choose(run, labels, rows);
    if (key === this.built) return;
    this.built = key;
    this.scalarCharts = new Map();
    const scalar = (name) => {
      const text = name.startsWith('device/') ? telemetry(name).title : title(name).replace(/^./, (c) => c.toUpperCase());
      const chart = new Chart(text, this.does, { height: name === 'loss' ? 96 : 64 });
      this.scalarCharts.set(name, chart);
      return chart.node;
    };
    const main = [...MAIN, 'clip_share'].filter((name) => name === 'clip_share' ? clips(run) : run.scalars.includes(name));
    this.top.replaceChildren(...main.map(scalar));
    const rest = [...run.scalars.filter((name) => !MAIN.includes(name)), ...(run.telemetry || [])];
    this.more.replaceChildren(this.more.firstChild, ...rest.map(scalar));
    this.more.hidden = !rest.length;
    this.layerCharts = rows.length ? plan(run).map((p) => [p, new Chart(p.name, this.does, { hint: p.hint })]) : [];
    this.below.replaceChildren(...this.layerCharts.map(([, chart]) => chart.node),
      ...(rows.length ? [] : [el('p', { class: 'empty' }, 'Choose a layer: click a row of the map, or find it by name.')]));
  }

  choose(run, labels, rows) {
    const { place } = this, key = JSON.stringify([labels, rows]);
    if (key === this.chosenKey) return;
    this.chosenKey = key;
    const take = (input) => {
      if (labels.includes(input.value)) { place.set({ rows: [...place.rows.slice(-MOST + 1), input.value] }); input.value = ''; }
    };
    const input = el('input', { type: 'text', list: 'layer-names', placeholder: 'Find a layer …', 'aria-label': 'Find a layer', autocomplete: 'off',
      onchange: () => take(input), oninput: () => take(input) });
    this.chips.replaceChildren(...rows.map((row, i) => {
      const dot = el('i', { class: 'dot' });
      dot.style.background = hue(i, rows.length);
      return el('button', { type: 'button', class: 'chip', 'aria-label': `Leave out ${labels[row]}`,
        onclick: () => place.set({ rows: rows.filter((r) => r !== row).map((r) => labels[r]) }) }, dot, labels[row], el('span', { 'aria-hidden': 'true' }, ' ×'));
    }), input, el('datalist', { id: 'layer-names' }, ...labels.slice(0, 2000).map((label) => el('option', { value: label }))));
  }

  update(run, labels, rows, scalars, lines, width, cursor) {
    this.build(run, labels, rows);
    const shared = { width, cursor };
    for (const [name, chart] of this.scalarCharts) {
      const values = scalars.arrays[name];
      if (!values) continue;
      const n = values.shape[1], part = (k) => values.subarray(k * n, (k + 1) * n), log = /_norm$|^step_s$/.test(name);
      const told = name.startsWith('device/') ? telemetry(name) : null;
      const scale = log ? (a) => a.map((v) => Math.log10(v)) : told?.divisor > 1 ? (a) => a.map((v) => v / told.divisor) : (a) => a;
      chart.update({ ...shared, edges: scalars.edges, log, unit: name === 'clip_share' ? 'share' : told ? told.unit : '',
        series: [{ name: '', colour: colour('accent'), low: scale(part(0)), mean: scale(part(1)), high: scale(part(2)) }] });
    }
    if (!lines || !rows.length) return;
    for (const [spec, chart] of this.layerCharts) {
      const series = rows.flatMap((row, i) => (rows.length > 1 && spec.unit === 'share' ? spec.lines.slice(0, 1) : spec.lines).map(([name, text, dash, own]) => ({
        name: [rows.length > 1 ? tail(labels[row]) : '', text].filter(Boolean).join(' '), dash, colour: own && rows.length === 1 ? colour(own) : hue(i, rows.length), ...curve(lines, name, i, rows.length),
      })));
      chart.update({ ...shared, edges: lines.edges, log: spec.log, unit: spec.unit, zone: spec.zone, series });
    }
  }

  cursor(step) {
    for (const chart of [...(this.scalarCharts?.values() || []), ...(this.layerCharts || []).map(([, c]) => c)]) {
      if (!chart.view) continue;
      chart.view.cursor = step;
      if (chart.canvas.offsetParent) chart.draw();
    }
  }
}

function curve(lines, name, i, count) {
  const n = lines.edges.length - 1;
  const plane = (statistic, k) => {
    const values = lines.arrays[statistic];
    return values && Float32Array.from({ length: n }, (_, c) => values[k * n * count + c * count + i]);
  };
  const bound = (edge) => (name.startsWith('clipped') ? undefined : name.replace(/_norm$/, `_${edge}_norm`));
  const states = lines.arrays[`${name}/states`];
  return {
    mean: plane(name, 1), low: (name.endsWith('_norm') && plane(bound('trough'), 0)) || plane(name, 0),
    high: (name.endsWith('_norm') && plane(bound('peak'), 2)) || plane(name, 2),
    states: states && Uint8Array.from({ length: n }, (_, c) => states[c * count + i]),
  };
}

const clips = (run) => run.statistics.some((s) => s.name === 'clip_share') && run.environment.fit?.clip;
const tail = (path) => path.split('/').slice(-2).join('/');

export const hue = (i, of) => (of === 1 ? colour('accent') : colour(`series${i % MOST}`));
