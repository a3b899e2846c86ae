// What the run was made with: configuration, versions, devices, and what of it can be trusted to come out the same.
import { dataPassport } from './data.js';
import { el } from './dom.js';
import { short } from './numbers.js';

const HIDDEN = new Set(['start', 'observed', 'unobserved_because']);
const LONG = 12; // rows of a section that is open from the start

function text(value) {
  if (value === null || value === undefined) return '-';
  if (typeof value === 'number') return Number.isInteger(value) ? String(value) : short(value);
  if (Array.isArray(value)) return value.map(text).join(', ') || '-';
  return String(value);
}

function rows(value, prefix = '') {
  return Object.entries(value).flatMap(([key, item]) => {
    const name = prefix ? `${prefix}.${key}` : key;
    return item && typeof item === 'object' && !Array.isArray(item) ? rows(item, name) : [[name, text(item)]];
  });
}

function table(pairs) {
  return el('dl', { class: 'table' }, ...pairs.map(([k, v]) => el('div', {}, el('dt', {}, k), el('dd', {}, v))));
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
    if (HIDDEN.has(key)) continue;
    if (value && typeof value === 'object' && !Array.isArray(value)) sections.push([key, rows(value)]);
    else plain.push([key, text(value)]);
  }
  if (typeof environment.start === 'number') plain.unshift(['started', new Date(environment.start * 1000).toLocaleString()]);
  if (run.end) plain.push(['ended', [run.end.how, run.end.detail].filter(Boolean).join(': ')]);
  const [level, words] = badge(environment);
  const trace = run.traced
    ? el('a', { href: new URL('#profile', window.parent.location.href).href, target: '_top' }, 'Open the device trace in the Profile tab') : null;
  const device = run.device?.length ? el('details', { open: true }, el('summary', {}, 'time and device'), table(run.device)) : null;
  return el('section', { 'aria-labelledby': 'passport-title' },
    el('div', { class: 'bar-head' }, el('h2', { id: 'passport-title' }, 'Passport'),
      el('span', { class: `badge ${level}` }, words), trace),
    plain.length || sections.length ? el('div', { class: 'passport' },
      table(plain), dataPassport(run.data), device, ...sections.filter(([, r]) => r.length).map(([name, pairs]) => el('details', { open: ['optimizer', 'compile'].includes(name) && pairs.length <= LONG },
        el('summary', {}, name), table(pairs)))) : el('p', { class: 'empty' }, 'This record has no passport.'));
}
