// What the run was made with: configuration, versions, devices, and what of it can be trusted to come out the same.
import { dataPassport } from './data.js';
import { el } from './dom.js';
import { short, words } from './numbers.js';

const TITLES = { tensorflow: 'TensorFlow', fit: 'Arguments of fit', updates: 'Updates of the optimizers', data: 'What the data looked like' };
const heading = (name) => TITLES[name] || words(name).replace(/^./, (c) => c.toUpperCase());
const HIDDEN = new Set(['start', 'observed', 'unobserved']);
const DEFAULT = '_DefaultDistributionStrategy'; // one device
const OPEN = new Set(['optimizer', 'compile']), LONG = 12; // sections that are open from the start, if they are short

function text(value) {
  if (value === null || value === undefined) return '-';
  if (typeof value === 'number') return Number.isInteger(value) ? String(value) : short(value);
  if (Array.isArray(value)) return value.map(text).join(', ') || '-';
  if (typeof value === 'object') return Object.entries(value).filter(([key]) => key !== 'name' && key !== 'config').map(([key, item]) => (key === 'class' ? text(item) : `${words(key)} ${text(item)}`)).join(', ');
  return String(value);
}

// What is not known, and what nobody asked for, is no line: a passport is read for what it says.
const said = ([, value]) => value !== '-' && value !== '';

function rows(value, prefix = '') {
  return Object.entries(value).flatMap(([key, item]) => {
    const name = prefix ? `${prefix}.${key}` : key;
    const several = Array.isArray(item) && item.some((one) => one && typeof one === 'object');
    if (several) return item.map((one, i) => [`${name}: ${one?.name ?? i}`, text(one)]);
    return item && typeof item === 'object' && !Array.isArray(item) ? rows(item, name) : [[name, text(item)]];
  }).filter(said);
}

function table(pairs) {
  return el('dl', { class: 'table' }, ...pairs.map(([k, v]) => el('div', {}, el('dt', {}, words(k)), el('dd', {}, v))));
}

function badge(environment) {
  const proof = environment.determinism?.certificate || environment.certificate;
  if (proof) return [proof.identical === false ? 'error' : 'good', `Determinism: ${text(proof.result ?? proof)}`];
  const on = environment.determinism?.enforced ?? environment.fit?.deterministic;
  return on ? ['good', 'Deterministic mode was on; not proven'] : ['unasked', 'Determinism was not asked for'];
}

export function passport(run) {
  const environment = run.environment, sections = [], plain = [];
  for (const [key, value] of Object.entries(environment)) {
    if (HIDDEN.has(key) || value === DEFAULT) continue;
    if (value && typeof value === 'object' && !Array.isArray(value)) sections.push([key, rows(value)]);
    else plain.push([key, text(value)]);
  }
  if (typeof environment.start === 'number') plain.unshift(['started', new Date(environment.start * 1000).toLocaleString()]);
  if (run.end) plain.push(['ended', [run.end.how, run.end.detail].filter(Boolean).join(': ')]);
  const [level, sentence] = badge(environment);
  const trace = run.traced
    ? el('a', { href: new URL('#profile', window.parent.location.href).href, target: '_top' }, 'Open the device trace in the Profile tab') : null;
  const folded = (name, pairs, open) => el('details', { open }, el('summary', {}, heading(name)), table(pairs));
  const device = run.device?.length ? folded('Time and device', run.device, true) : null, data = dataPassport(run.data);
  const parts = sections.filter(([, pairs]) => pairs.length).map(([name, pairs]) => folded(name, pairs, OPEN.has(name) && pairs.length <= LONG));
  const half = device || data ? parts.length : Math.ceil(parts.length / 2);
  return el('section', { 'aria-labelledby': 'passport-title' },
    el('div', { class: 'bar-head' }, el('h2', { id: 'passport-title' }, 'Passport'),
      el('span', { class: `badge ${level}` }, sentence), trace),
    plain.length || parts.length || device || data ? el('div', { class: 'passport' },
      el('div', {}, table(plain.filter(said)), ...parts.slice(0, half)), el('div', {}, device, data, ...parts.slice(half)))
      : el('p', { class: 'empty' }, 'This record has no passport.'));
}
