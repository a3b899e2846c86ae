// The data passport as a table: what was trained on beside what was validated on, so that a difference is seen at once.
import { el } from './dom.js';
import { count, short } from './numbers.js';

const percent = (share) => (share ? `${short(100 * share)} %` : 'none');
const spread = (value) => (Array.isArray(value) ? value.map(short).join(', ') : value && typeof value === 'object' ? `${short(value.lowest)} to ${short(value.highest)}, median ${short(value.median)}` : '-');

function leaf(role, one) {
  const name = one.name ? `${role} ${one.name}` : role, labels = one.labels, lines = [
    [`${name}: shape, dtype`, `(${(one.shape || []).map((n) => n ?? 'any').join(', ')}) ${one.dtype ?? ''}`],
    [`${name}: range`, one.min === undefined ? '-' : `${short(one.min)} to ${short(one.max)}`],
    [`${name}: mean`, spread(one.mean)],
    [`${name}: standard deviation`, spread(one.std)],
    [`${name}: NaN or infinite`, percent((one.nan_share || 0) + (one.inf_share || 0))],
  ];
  if (one.constant_features) lines.push([`${name}: constant features`, `${count(one.constant_features.count)} of ${count(one.constant_features.of)}`]);
  if (!labels) return lines;
  const total = Object.values(labels.counts || {}).reduce((a, n) => a + n, 0);
  const shares = Object.entries(labels.counts || {}).slice(0, 10).map(([label, n]) => `${label}: ${short((100 * n) / total)} %`);
  lines.push([`${name}: classes`, `${count(labels.classes)}${shares.length ? ` (${shares.join(', ')}${Object.keys(labels.counts).length > 10 ? ', …' : ''})` : ''}`]);
  if (labels.batch_entropy !== undefined) {
    lines.push([`${name}: label entropy of a batch`, `${short(labels.batch_entropy)} bits, ${short(labels.batch_entropy_shuffled)} if shuffled`],
      [`${name}: length of runs of a label`, `${short(labels.run_length)}, ${short(labels.run_length_shuffled)} if shuffled`]);
  }
  return lines;
}

// How much of the data a description is of.
const sample = ({ rows, batches, share }) => (share >= 1 ? `all rows, ${count(batches)} batches` : `${count(rows)} rows (${percent(share)}), ${count(batches)} batches`);

function lines(side) {
  if (!side) return new Map();
  const rows = side.rows === undefined ? [] : [['rows', count(side.rows)], ['batches', count(side.batches)], ['rows a batch', (side.batch_size || []).join(' to ')]];
  const seen = side.seen ? [['described from', sample(side.seen)]] : [], watched = side.passes?.length > 1 ? [['passes looked at', count(side.passes.length)]] : [];
  const order = side.order ? [['order repeats from pass to pass', side.order.inputs_repeat ? 'yes' : 'no']] : [];
  const shuffles = (side.pipeline?.shuffles || []).map((s, i) => [`shuffle ${i + 1} of the pipeline`,
    [`buffer ${s.buffer ?? '?'}`, s.cardinality !== null && s.cardinality !== undefined ? `of ${count(s.cardinality)}` : '', s.before_batch === false ? 'after batch' : ''].filter(Boolean).join(' ')]);
  return new Map([
    ['source', String(side.source ?? '-')], ...(side.unseen ? [['not looked at', side.unseen]] : []), ...rows, ...seen, ...watched,
    ...(side.pipeline?.stages ? [['pipeline', side.pipeline.stages.map((s) => s.name).join(' → ')]] : []), ...shuffles, ...order,
    ...(side.duplicates ? [['rows that occur twice', percent(side.duplicates.share)]] : []),
    ...(side.inputs || []).flatMap((one) => leaf('input', one)), ...(side.targets || []).flatMap((one) => leaf('target', one)),
    ...(side.weights || []).flatMap((one) => leaf('sample weight', one)),
  ]);
}

// A record from elsewhere may hold anything: what is no data passport is said to be none, and the page goes on.
export function dataPassport(data) {
  try {
    return data?.train ? table(data) : null;
  } catch (error) {
    return el('p', { class: 'problem', role: 'note' }, `The data passport of this record makes no sense: ${error.message}`);
  }
}

function table(data) {
  const train = lines(data.train), validation = lines(data.validation), both = validation.size > 0;
  const names = [...train.keys(), ...[...validation.keys()].filter((name) => !train.has(name))];
  const head = ['', 'Training', ...(both ? ['Validation'] : [])];
  const shared = data.overlap?.sampled_rows ? el('p', { class: 'sub' }, data.overlap.shared
    ? `${percent(data.overlap.share)} of the validation rows that were compared (${count(data.overlap.sampled_rows)}) are training rows too.`
    : `None of the ${count(data.overlap.sampled_rows)} validation rows that were compared is a training row.`) : null;
  return el('details', { open: true }, el('summary', {}, 'What the data looked like'), shared,
    el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'What the data looked like' }, el('table', {},
      el('thead', {}, el('tr', {}, ...head.map((name) => (name ? el('th', { scope: 'col' }, name) : el('td', {}))))),
      el('tbody', {}, ...names.map((name) => el('tr', {}, el('th', { scope: 'row' }, name), el('td', {}, train.get(name) ?? '-'),
        both ? el('td', {}, validation.get(name) ?? '-') : null))))));
}
