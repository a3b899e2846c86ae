// Two runs on the same steps and scale: the other one's map, the difference of both, and what differs in their passports.
import { Chart, column } from './chart.js';
import { Heatmap } from './heatmap.js';
import { el } from './dom.js';
import { legend } from './legend.js';
import { count, short } from './numbers.js';
import { scaleOf } from './scale.js';
import { colour } from './theme.js';
import { chosen, describe, domain, ordered } from './map.js';
import { decode, MISSING, STATE } from './wire.js';

export class Comparison {
  constructor(place, does) {
    this.place = place;
    this.own = new Heatmap('Map of this run', does);
    this.other = new Heatmap('Map of the other run', does);
    this.difference = new Heatmap('Difference of the two runs', does);
    this.loss = new Chart('Loss of both', does, { height: 110 });
    this.legend = el('div', {});
    this.said = el('p', { class: 'said' });
    this.table = el('div', {});
    this.ranked = el('div', { class: 'ranked' });
    this.names = [el('h3', {}), el('h3', {}), el('h3', {})];
    this.node = el('section', { 'aria-labelledby': 'compare-title', hidden: true },
      el('div', { class: 'bar-head' }, el('h2', { id: 'compare-title' }, 'Comparison')), this.ranked, this.said, this.loss.node,
      this.names[0], this.own.node, this.names[1], this.other.node, this.names[2], this.legend, this.difference.node, this.table);
  }

  // `mine` and `yours` are pictures with the same edges; rows are matched by their paths.
  update({ run, versus, mine, yours, scalars, others, told, labels, scale, width }) {
    const { place } = this, rows = versus.rows[place.group] || versus.rows.layers, theirs = rows.map((r) => r.path);
    const order = ordered(mine, place.order), picked = chosen(labels, place.rows);
    const matched = match(mine, yours, labels, theirs);
    const shared = { labels, width, order, chosen: picked, show: place.show };
    const first = told.differs === null ? [] : [{ first: told.differs, last: told.differs, colour: 'warning', current: true }];
    if (told.diverges !== null) first.push({ first: told.diverges, last: told.diverges, colour: 'error', current: true });
    this.names[0].textContent = run.name;
    this.names[1].textContent = versus.name;
    this.names[2].textContent = `Difference: ${versus.name} over ${run.name}`;
    this.own.update({ ...shared, picture: mine, scale, marks: first, describe: (v, s) => describe(mine, v, s) });
    this.other.update({ ...shared, picture: matched, scale, marks: first, describe: (v, s) => describe(matched, v, s) });
    const apart = subtract(mine, matched);
    const far = Math.max(...domain(apart).map(Math.abs), apart.kind === 'difference' ? 0.5 : 0);
    const colours = scaleOf(apart.kind, -far, far);
    this.legend.replaceChildren(legend(colours));
    this.difference.update({ ...shared, show: 'mean', picture: apart, scale: colours, marks: first,
      describe: (v) => (apart.kind === 'difference' ? `${short(10 ** v)} times as large` : `${short(v)} more`) });
    this.loss.node.hidden = !(scalars.arrays.loss && others.arrays.loss);
    if (!this.loss.node.hidden) {
      const series = [[versus.name, others, 'series1'], [run.name, scalars, 'accent']];
      this.loss.update({ width, edges: scalars.edges, series: series.map(([name, from, hue]) => ({ name, colour: colour(hue), ...along(scalars.edges, from) })) });
    }
    this.said.textContent = sentence(told);
    this.ranked.replaceChildren(...explanations(told, run.name, versus.name));
    this.table.replaceChildren(told.passport.length ? table(told.passport, run.name, versus.name)
      : el('p', { class: 'empty' }, 'The passports say the same.'));
  }
}

// The loss of a run in the columns of the other one's picture: each run of a report has columns of its own.
function along(edges, { arrays: { loss }, edges: own }) {
  const n = loss.shape[1], at = Array.from({ length: edges.length - 1 }, (_, i) => column(own, (edges[i] + edges[i + 1] - 1) / 2));
  const [low, mean, high] = [0, 1, 2].map((k) => Float32Array.from(at, (c) => (c < 0 ? NaN : loss[k * n + c])));
  return { low, mean, high };
}

function sentence(told) {
  if (!told.common) return 'The runs have no recorded steps in common.';
  if (told.differs === null) return `The losses are the same bits in all ${count(told.common)} steps that both recorded.`;
  const seen = told.diverges === null ? 'and stay within 5 % of each other.' : `and are more than 5 % apart from step ${count(told.diverges)} on.`;
  return `The losses first differ at step ${count(told.differs)}, ${seen}`;
}

// What likely explains that the other run did not do what this one did, and where it left this one's band.
function explanations(told, run, versus) {
  const [good, bad] = told.good === 'run' ? [run, versus] : [versus, run];
  const likely = told.ranked.map((d) => el('li', {},
    el('p', {}, el('b', {}, d.name), ` ${d.good} → ${d.bad} `, el('span', { class: 'share' }, `${Math.round(100 * d.likelihood)} % likely`)),
    el('p', {}, [d.message, ...d.support].filter(Boolean).join(' ')),
    ...d.advice.map((line) => el('p', { class: 'try' }, el('b', {}, 'Try'), line))));
  return [
    el('h3', {}, likely.length ? `What most likely explains that ${bad} (BAD) differs from ${good} (GOOD)` : told.verdict),
    likely.length ? el('ol', { 'aria-label': 'Explanations, likeliest first' }, ...likely) : '',
    el('p', {}, told.start),
    ...(told.departures.length ? [el('p', {}, 'BAD leaves the band in which GOOD moves:'), el('ul', {}, ...told.departures.map((each) => el('li', {}, each)))] : []),
  ];
}

function table(rows, left, right) {
  return el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'What differs between the passports' }, el('table', {},
    el('caption', {}, 'What differs between the passports'),
    el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Entry'), el('th', { scope: 'col' }, left), el('th', { scope: 'col' }, right))),
    el('tbody', {}, ...rows.map(([name, a, b]) => el('tr', {}, el('th', { scope: 'row' }, name), el('td', {}, a), el('td', {}, b))))));
}

// The other run's picture with the rows of ours.
function match(mine, yours, labels, theirs) {
  const at = labels.map((label) => theirs.indexOf(label)), columns = Math.min(mine.columns, yours.columns), arrays = { extents: yours.arrays.extents };
  for (const [name, make] of [['low', Int16Array], ['mean', Int16Array], ['high', Int16Array], ['states', Uint8Array]]) {
    arrays[name] = make.from({ length: columns * labels.length }, (_, i) => {
      const row = at[i % labels.length], c = Math.floor(i / labels.length);
      return row < 0 ? (name === 'states' ? STATE.missing : MISSING) : yours.arrays[name][c * yours.rows + row];
    });
  }
  return { ...yours, rows: labels.length, columns, arrays };
}

function subtract(mine, other) {
  const logarithmic = mine.kind === 'ratio' || mine.kind === 'log', size = other.arrays.mean.length;
  const values = Float32Array.from({ length: size }, (_, i) => decode(other.arrays.mean[i], other.factor) - decode(mine.arrays.mean[i], mine.factor));
  const far = values.reduce((a, v) => (Number.isFinite(v) ? Math.max(a, Math.abs(v)) : a), 0) || 1, factor = 32000 / far;
  const mean = Int16Array.from(values, (v) => (Number.isFinite(v) ? Math.round(v * factor) : MISSING));
  const states = Uint8Array.from(mean, (code, i) => (code === MISSING ? STATE.missing
    : Math.max(mine.arrays.states[i], other.arrays.states[i]) === STATE.nonfinite ? STATE.nonfinite : STATE.fine));
  return { ...other, kind: logarithmic ? 'difference' : 'signed', factor, arrays: { ...other.arrays, low: mean, mean, high: mean, states } };
}
