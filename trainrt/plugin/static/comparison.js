// Runs side by side, on the same steps and scale: a baseline, and of each other one its map, where it differs from the
// baseline, since when, what most likely explains it, and what their passports say.
import { Chart, column } from './chart.js';
import { Heatmap } from './heatmap.js';
import { choice, el } from './dom.js';
import { hue, MOST } from './drill.js';
import { legend } from './legend.js';
import { count, short } from './numbers.js';
import { RIGHT, gutter } from './axis.js';
import { align, match, passports, subtract } from './pairs.js';
import { scaleOf } from './scale.js';
import { chosen, describe, domain, ordered } from './map.js';

const GAP = 16, WIDE = 860, TALL = 300;
const HEALTH = { good: 'no fault found', info: 'no fault found', none: 'no verdict yet' };

export class Comparison {
  constructor(place, does) {
    this.place = place;
    this.does = does;
    this.loss = new Chart('Loss of each run', does, { height: 120 });
    this.board = el('div', {});
    this.panels = [];
    this.said = new Map();
    [this.baseline, this.reasons, this.grid, this.table] = ['controls', 'reasons', 'pairs', ''].map((name) => el('div', { class: name }));
    this.problems = el('p', { class: 'problem', role: 'note', hidden: true });
    this.node = el('section', { 'aria-labelledby': 'compare-title', hidden: true },
      el('div', { class: 'bar-head' }, el('h2', { id: 'compare-title', tabindex: -1 }, 'Comparison'), this.baseline),
      this.problems, this.board, this.reasons, this.loss.node, this.grid, this.table);
  }

  // `sides`: of each run its summary `run`, `picture` (null: it has none of this statistic), `scalars`, and `told`, what
  // the server says of it against the baseline (null for the baseline itself). All pictures have the edges of `frame`,
  // that of the run above, whose rows and order hold here too.
  update({ sides, frame, unreadable, rows, scale, width }) {
    const base = sides.find((side) => !side.told), others = sides.filter((side) => side.told);
    sides.forEach((side, i) => { side.hue = hue(i, 2); });
    this.problems.hidden = !unreadable.length;
    this.problems.textContent = unreadable.join(' ');
    const names = sides.map((side) => side.run.name);
    this.renew(this.baseline, [names, base.run.name], () => [choice('Baseline', names.map((name) => [name, name]), base.run.name,
      (baseline) => this.place.set({ baseline }))]);
    const all = [base, ...others].map((side) => [side.run.name, side.run.verdict, side.run.loss, side.hue, side.told]);
    this.renew(this.board, all, () => [board([base, ...others])]);
    this.renew(this.reasons, all, () => this.explanations(base, others));
    this.losses(sides, width);
    this.maps(base, others, frame, rows, scale, width);
    this.renew(this.table, all, () => [table(base, others)]);
  }

  // Makes a node's children anew only when what they say has changed: what is focused, open or scrolled to stays.
  renew(node, said, make) {
    const key = JSON.stringify(said);
    if (this.said.get(node) === key) return;
    this.said.set(node, key);
    const held = node.contains(document.activeElement);
    node.replaceChildren(...make());
    if (held) node.querySelector('select, [tabindex], summary')?.focus();
  }

  explanations(base, others) {
    const open = new Set([...this.reasons.querySelectorAll('details[open]')].map((node) => node.dataset.run));
    return others.map(({ run, told }) => {
      const words = explanations(told, base.run.name, run.name, others.length > 1);
      return el('details', { class: 'ranked', 'data-run': run.name, open: others.length === 1 || open.has(run.name) },
        el('summary', {}, words.title), ...words.body);
    });
  }

  show() {
    this.node.scrollIntoView();
    this.node.querySelector('h2').focus();
  }

  losses(sides, width) {
    const { edges } = sides[0].scalars;
    const having = sides.filter((side) => side.scalars.arrays.loss);
    this.loss.node.hidden = !having.length;
    if (!having.length) return;
    const marks = having.filter(({ told }) => told && told.diverges !== null).map((side) => ({ step: side.told.diverges, colour: side.hue }));
    this.loss.update({ width, edges, marks, series: having.map((side) => ({ name: side.run.name, colour: side.hue, ...along(edges, side.scalars) })) });
  }

  // A row of the grid is a run: its map, and to the right of it its difference from the baseline.
  maps(base, others, frame, rows, scale, width) {
    const { place } = this, labels = rows.map((row) => row.path), wide = width >= WIDE;
    const plot = (width - gutter(width) - 2 * RIGHT - GAP) / 2;
    const shared = { labels, order: ordered(frame, place.order), chosen: chosen(labels, place.rows), tall: TALL };
    const left = { ...shared, scale, show: place.show, width: wide ? Math.floor(gutter(width) + plot + RIGHT) : width, left: gutter(width) };
    const right = { ...shared, show: 'mean', width: wide ? Math.floor(plot + RIGHT) : width, left: wide ? 0 : gutter(width) };
    const rowsOf = (run) => run.rows[place.group] || run.rows.layers;
    const laid = (side) => side.picture && match(frame, side.picture, align(rows, rowsOf(side.run)));
    const origin = laid(base), pictures = others.map(laid), apart = pictures.map((picture) => origin && picture && subtract(origin, picture));
    const known = apart.filter(Boolean), kind = known[0]?.kind;
    const far = Math.max(0, ...known.flatMap((picture) => domain(picture).map(Math.abs)), kind === 'difference' ? 0.5 : 0);
    const colours = known.length ? scaleOf(kind, -far, far) : null;
    this.grid.classList.toggle('wide', wide);
    this.grid.style.gridTemplateColumns = wide ? `${left.width}px ${right.width}px` : '';
    const cells = [[base, origin, null, []], ...others.map((side, i) => [side, pictures[i], apart[i], firsts(side.told)])].map(([side, picture, difference, marks], i) => {
      const panel = this.panel(i), { name } = side.run;
      const title = el('h3', {}, dot(side.hue), name, i ? '' : el('span', { class: 'pill' }, 'baseline'));
      if (picture) panel.map.update({ ...left, picture, marks, name: `Map of ${name}`, describe: (v, s) => describe(picture, v, s) });
      if (difference) {
        panel.apart.update({ ...right, picture: difference, scale: colours, marks, name: `${name} against ${base.run.name}`,
          describe: (v) => (kind === 'difference' ? `${short(10 ** v)} times the baseline's` : `${short(Math.abs(v))} ${v < 0 ? 'less' : 'more'} than the baseline's`) });
      }
      const own = picture ? panel.map.node : el('p', { class: 'empty' }, `${name} did not record this statistic.`);
      if (i) return [el('div', {}, title, own), el('div', {}, el('h3', {}, wide ? 'against the baseline' : `${name} against the baseline`), difference ? panel.apart.node : el('p', { class: 'empty' }, 'Nothing to compare.'))];
      const key = colours ? el('div', { class: 'key-to' }, el('h3', {}, 'Against the baseline'), legend(colours),
        el('p', { class: 'firsts' }, el('i', { class: 'first differs' }), 'first step whose loss has other bits ', el('i', { class: 'first diverges' }), 'first step more than 5 % apart')) : '';
      return [el('div', {}, title, own), el('div', {}, key)];
    });
    this.panels.length = cells.length;
    const held = this.grid.contains(document.activeElement) ? document.activeElement : null;
    this.grid.replaceChildren(...cells.flat());
    held?.focus({ preventScroll: true });
  }

  panel(i) {
    return (this.panels[i] ??= { map: new Heatmap('', this.does), apart: new Heatmap('', this.does) });
  }

  cursor(step) {
    for (const { map, apart } of this.panels) {
      for (const heat of [map, apart]) {
        if (!heat.view || !heat.canvas.offsetParent || heat.cell) continue;
        heat.view.cursor = step;
        heat.draw();
      }
    }
    if (this.loss.view && this.loss.canvas.offsetParent) { this.loss.view.cursor = step; this.loss.draw(); }
  }
}

const dot = (hue) => {
  const node = el('i', { class: 'dot' });
  node.style.background = hue;
  return node;
};

// Marks over a map: the first step whose loss is not the same bits, and the first at which one can see it.
const firsts = (told) => [[told.differs, 'warning'], [told.diverges, 'error']].filter(([step]) => step !== null)
  .map(([step, colour]) => ({ first: step, last: step, colour, current: true }));

// The loss of a run in the columns of the frame: each run of a report has columns of its own.
function along(edges, { arrays: { loss }, edges: own }) {
  const n = loss.shape[1], at = Array.from({ length: edges.length - 1 }, (_, i) => column(own, (edges[i] + edges[i + 1] - 1) / 2));
  const [low, mean, high] = [0, 1, 2].map((k) => Float32Array.from(at, (c) => (c < 0 ? NaN : loss[k * n + c])));
  return { low, mean, high };
}

// All runs in a few words each, the baseline first.
function board(sides) {
  const since = (told, name) => (!told ? '' : !told.common ? 'no common steps' : told[name] === null ? 'never' : `step ${count(told[name])}`);
  const why = ({ told }) => {
    if (!told) return '';
    const [first] = told.ranked;
    if (!first) return [told.verdict];
    const change = told.good === 'run' ? [first.good, first.bad] : [first.bad, first.good]; // from the baseline's to its own
    return [el('b', {}, first.name), ` ${change.join(' → ')} `, share(first)];
  };
  const row = (side) => el('tr', {}, el('th', { scope: 'row' }, dot(side.hue), side.run.name, side.told ? '' : ' ', side.told ? '' : el('span', { class: 'pill' }, 'baseline')),
    el('td', {}, HEALTH[side.run.verdict.level] || side.run.verdict.title.replace('Likely cause: ', '')),
    el('td', { class: 'number' }, side.run.loss ? `${short(side.run.loss[0])} → ${short(side.run.loss[1])}` : '-'),
    el('td', { class: 'number' }, since(side.told, 'differs')), el('td', { class: 'number' }, since(side.told, 'diverges')), el('td', {}, ...why(side)));
  return scroll('The runs', 'board', el('thead', {}, el('tr', {}, ...['Run', 'Verdict', 'Loss', 'Other bits from', 'Over 5 % apart from', 'Most likely explained by']
    .map((name) => el('th', { scope: 'col' }, name)))), el('tbody', {}, ...sides.map(row)));
}

const share = (difference) => el('span', { class: 'share' }, `${Math.round(100 * difference.likelihood)} % likely`);

function sentence(told) {
  if (!told.common) return 'The runs have no recorded steps in common.';
  if (told.differs === null) return `The losses are the same bits in all ${count(told.common)} steps that both recorded.`;
  const seen = told.diverges === null ? 'and stay within 5 % of each other.' : `and are more than 5 % apart from step ${count(told.diverges)} on.`;
  return `The losses first differ at step ${count(told.differs)}, ${seen}`;
}

// What likely explains that one did not do what the other did, and where it left its band.
function explanations(told, run, versus, several) {
  const [good, bad] = told.good === 'run' ? [run, versus] : [versus, run];
  const likely = told.ranked.map((d) => el('li', {},
    el('p', {}, el('b', {}, d.name), ` ${d.good} → ${d.bad} `, share(d)),
    el('p', {}, [d.message, ...d.support].filter(Boolean).join(' ')),
    ...d.advice.map((line) => el('p', { class: 'try' }, el('b', {}, 'Try'), line))));
  return {
    title: several ? `${bad} (BAD) against ${good} (GOOD)`
      : likely.length ? `What most likely explains that ${bad} (BAD) differs from ${good} (GOOD)` : told.verdict,
    body: [
      several && !likely.length ? el('p', {}, told.verdict) : '',
      likely.length ? el('ol', { 'aria-label': 'Explanations, likeliest first' }, ...likely) : '',
      el('p', {}, `${told.start} ${sentence(told)}`),
      ...(told.departures.length ? [el('p', {}, 'BAD leaves the band in which GOOD moves:'), el('ul', {}, ...told.departures.map((each) => el('li', {}, each)))] : []),
    ],
  };
}

// What differs between the passports, a column a run; what is not the baseline's stands out.
function table(base, others) {
  const lines = passports(others.map(({ told }) => told.passport));
  if (!lines.length) return el('p', { class: 'empty' }, 'The passports say the same.');
  const head = [base, ...others].map((side) => el('th', { scope: 'col' }, dot(side.hue), side.run.name));
  return scroll('What differs between the passports', 'passports', el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Entry'), ...head)),
    el('tbody', {}, ...lines.map(([name, own, ...rest]) => el('tr', {}, el('th', { scope: 'row' }, name), el('td', {}, own),
      ...rest.map((value) => el('td', {}, value === own ? value : el('b', {}, value)))))));
}

function scroll(name, kind, ...parts) {
  return el('div', { class: `scroll ${kind}`, tabindex: 0, role: 'region', 'aria-label': name }, el('table', {}, el('caption', {}, name), ...parts));
}

export { MOST as MOST_RUNS };
