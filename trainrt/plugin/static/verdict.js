// The head of the page: how the run is, and what was found, likeliest cause first.
import { el } from './dom.js';
import { count, duration, short, steps } from './numbers.js';

const SIGN = {
  good: 'M5 12.5l4.5 4.5L19 7.5', info: 'M5 12.5l4.5 4.5L19 7.5', warning: 'M12 6v7.5M12 17.2v.6',
  error: 'M7 7l10 10M17 7L7 17', none: 'M7 12h.01M12 12h.01M17 12h.01',
};
const STATUS = { good: 'Healthy', info: 'Healthy', warning: 'Warning', error: 'Error', none: 'No data' };

function sign(level) {
  const space = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(space, 'svg'), path = document.createElementNS(space, 'path');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('class', `sign ${level}`);
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', STATUS[level]);
  path.setAttribute('d', SIGN[level]);
  svg.append(path);
  return svg;
}

export function state(run) {
  if (!run.end) return run.windows && Date.now() / 1000 - run.last_time < 120 ? ['running', 'live'] : ['no end recorded: running or killed', 'open'];
  return [{ finished: 'finished', stopped: 'stopped early', exception: 'ended with an exception', interrupted: 'interrupted' }[run.end.how] || run.end.how, 'ended'];
}

function facts(run) {
  const optimizer = run.environment.optimizer, config = optimizer?.config || {}, clip = run.environment.fit?.clip;
  const rate = typeof config.learning_rate === 'number' ? ` ${short(config.learning_rate)}` : '';
  const logs = Object.entries(run.epochs[0]?.logs || {}).filter(([name]) => /^val_/.test(name) && name !== 'val_loss');
  return [
    ['Loss', run.loss && `${short(run.loss[0])} → ${short(run.loss[1])}`],
    ...logs.slice(0, 1).map(([name, value]) => [name.replace('val_', 'Validation '), short(value)]),
    ['Steps', run.steps && `${count(run.steps[1] - run.steps[0] + 1)}${run.epoch_count ? ` in ${run.epoch_count} epoch${run.epoch_count > 1 ? 's' : ''}` : ''}`],
    ['Model', `${run.environment.model?.name ? `${run.environment.model.name}, ` : ''}${run.rows.layers.length} layers, ${count(run.elements)} weights`],
    ['Optimizer', optimizer && `${optimizer.class || optimizer.name}${rate}${clip ? `, clip ${typeof clip === 'number' ? short(clip) : clip}` : ''}`],
    ['Time', duration(run.seconds)],
  ].filter(([, value]) => value);
}

export function verdict(run, place, go) {
  const { level, title } = run.verdict;
  const [text, kind] = state(run), bad = run.findings.length > 0 && (level === 'warning' || level === 'error');
  const head = el('div', { class: 'verdict' }, sign(level),
    el('div', { class: 'said' }, el('h1', {}, title),
      el('p', { class: 'sub' }, bad ? run.findings[0].message : quiet(run)),
      bad && run.findings[0].advice[0] ? el('p', { class: 'try' }, el('b', {}, 'Try'), run.findings[0].advice[0]) : null),
    el('span', { class: `pill ${kind}` }, text));
  const list = el('ol', { class: 'findings', 'aria-label': 'Findings, likeliest cause first' },
    ...run.findings.map((finding, i) => row(finding, i, place.finding === i, go, bad && i === 0)));
  const problems = run.problems.length
    ? el('p', { class: 'problem', role: 'note' }, `Not all of the record could be read. ${run.problems.join(' ')}`) : null;
  return el('section', { class: 'top', 'aria-label': 'Verdict' }, head,
    el('dl', { class: 'facts' }, ...facts(run).map(([k, v]) => el('div', {}, el('dt', {}, k), el('dd', {}, v)))),
    problems, run.findings.length ? list : null);
}

function quiet(run) {
  if (!run.windows) return (run.end && run.end.detail) || 'The record has no windows of steps. Its passport is below.';
  if (run.verdict.level === 'none') return 'The map is below; the verdict follows in a moment.';
  const notes = run.findings.length;
  return `Every rule looked at every recorded step of every layer.${notes ? ` ${notes === 1 ? 'A note' : `${notes} notes`} below.` : ''}`;
}

function row(finding, i, open, go, told) {
  const where = finding.where.length ? finding.where.slice(0, 3).join(', ') + (finding.where.length > 3 ? ` and ${finding.where.length - 3} more` : '') : 'the whole run';
  const body = el('div', { class: 'body', id: `finding-${i}`, hidden: !open },
    told ? null : el('p', {}, finding.message),
    finding.advice.length ? el('p', { class: 'label' }, 'Try') : null,
    finding.advice.length ? el('ul', {}, ...finding.advice.map((line) => el('li', {}, line))) : null,
    finding.consequences.length ? el('p', { class: 'label' }, 'What followed from it') : null,
    finding.consequences.length ? el('ul', {}, ...finding.consequences.map((c) => el('li', {}, `${c.rule}: ${c.message}`))) : null);
  return el('li', { class: open ? 'open' : '' },
    el('button', { type: 'button', 'aria-expanded': String(open), 'aria-controls': `finding-${i}`, onclick: () => go(open ? null : i) },
      el('span', { class: `severity ${finding.severity}` }, finding.severity),
      el('span', { class: 'cause' }, finding.causes[0] || finding.rule),
      el('span', { class: 'where' }, where),
      el('span', { class: 'since' }, finding.steps ? steps(...finding.steps) : '')),
    body);
}
