// The page: asks for what the place needs, hands it to the sections, and keeps up with a run that grows.
import { Comparison, MOST_RUNS } from './comparison.js';
import { choice, el, once } from './dom.js';
import { Drill, MOST, statisticsOf } from './drill.js';
import { chosen, MapSection } from './map.js';
import { passport } from './passport.js';
import { Place } from './place.js';
import { watchTheme } from './theme.js';
import { verdict } from './verdict.js';

const PULSE_MS = 2000, PATIENCE = 20;

export function mount(root, source) {
  let page = null;
  watchTheme(() => page?.redraw());
  page = new Page(root, source);
  page.start();
  return page;
}

class Page {
  constructor(root, source) {
    this.source = source;
    this.place = new Place();
    this.asked = 0;
    this.drawn = 0;
    this.answers = new Map();
    const does = {
      hover: (step) => this.hover(step), zoom: (first, last) => this.zoom(first, last),
      out: () => this.place.set({ first: null, last: null, finding: null }),
      pick: (row, add) => this.pick(row, add), group: (group) => this.place.set({ group }),
    };
    this.bar = el('header', { class: 'bar' });
    this.head = el('div', {});
    this.map = new MapSection(this.place, does);
    this.drill = new Drill(this.place, does);
    this.comparison = new Comparison(this.place, does);
    this.passport = el('div', {});
    this.sections = el('div', { hidden: true }, this.map.node, this.drill.node, this.comparison.node);
    this.status = el('p', { class: 'status', role: 'status' }, 'Reading the record …');
    this.main = el('main', {}, this.bar, this.status, this.head, this.sections, this.passport);
    root.replaceChildren(this.main);
    this.place.on((changed) => this.moved(changed));
    new ResizeObserver(once(80, () => { if (this.width !== this.measured) this.refresh(); })).observe(this.main);
  }

  get width() { return Math.floor(this.sections.clientWidth || this.main.clientWidth - 2); }

  async start() {
    await this.listing();
    if (this.source.live) setInterval(() => { if (!document.hidden) this.pulse(); }, PULSE_MS);
  }

  async listing() {
    try {
      const told = await this.source.runs();
      this.names = told.runs;
      if (told.versus && !this.place.versus.length && !this.place.run) this.place.versus = told.versus;
    } catch (error) {
      return this.fail(error);
    }
    if (!this.names.length) return this.fail(new Error('No run below the log directory has a record yet. Write one: trainrt.fit(model, x, y, logdir=...).'));
    if (!this.names.includes(this.place.run)) {
      if (this.place.run) this.lost = this.place.run;
      this.place.run = this.names[0];
    }
    return this.load();
  }

  fail(error) {
    this.status.textContent = error.message;
    this.status.hidden = false;
    this.status.classList.add('bad');
    this.sections.hidden = true;
    this.done();
  }

  done() {
    this.drawn += 1;
    this.mark('picture');
    document.body.dataset.ready = this.drawn;
  }

  // When the first of each was drawn, for who measures.
  mark(what) {
    if (!performance.getEntriesByName(`trainrt ${what}`).length) performance.mark(`trainrt ${what}`);
  }

  // Everything of a run: once at first, and when it has grown.
  async load() {
    const asked = (this.asked += 1);
    try {
      const run = await this.source.run({ run: this.place.run });
      if (asked !== this.asked) return;
      this.bars();
      if (run.unreadable) {
        this.head.replaceChildren();
        this.passport.replaceChildren();
        this.run = run;
        this.fail(new Error(run.unreadable));
        return;
      }
      this.run = run;
      this.settle(run);
      await this.refresh();
    } catch (error) {
      if (asked === this.asked) this.fail(error);
    }
  }

  // Completes a place that says only part of where to look.
  settle(run) {
    const { place } = this;
    if (!run.rows[place.group]) place.group = 'layers';
    if (!run.statistics.some((s) => s.name === place.statistic)) place.statistic = run.statistics[0]?.name || 'update_ratio';
    if (place.finding !== null && place.first === null && run.findings[place.finding]) this.go(place.finding, false);
    if (!place.rows.length && !this.settled) {
      const where = run.findings.find((f) => f.where.length)?.where || [];
      place.rows = where.length ? where.slice(0, 1) : run.rows[place.group].slice(0, 1).map((r) => r.path);
    }
    this.settled = true;
  }

  heads() {
    const focused = document.activeElement?.closest?.('.findings li');
    const index = focused ? [...focused.parentNode.children].indexOf(focused) : -1;
    this.head.replaceChildren(verdict(this.run, this.place, (i) => this.go(i)));
    if (index >= 0) this.head.querySelectorAll('.findings button')[index]?.focus();
    this.passport.replaceChildren(passport(this.run));
  }

  bars() {
    const { place } = this, key = JSON.stringify([this.names, place.run, place.versus, this.lost]);
    if (key === this.barred) return;
    this.barred = key;
    const chosen = this.versus, others = this.names.filter((name) => name !== place.run && !chosen.includes(name));
    const held = this.bar.contains(document.activeElement) ? document.activeElement.getAttribute('aria-label') : null;
    const room = MOST_RUNS - 1 - chosen.length, all = others.length > 1 && others.length <= room;
    const add = (value) => place.set({ versus: [...chosen, ...(value === '*' ? others : [others[Number(value)]])] });
    this.bar.replaceChildren(
      choice('Run', this.names.map((n) => [n, n]), place.run, (run) => { this.settled = false; place.set({ run, versus: chosen.filter((n) => n !== run), rows: [], finding: null, first: null, last: null }); }),
      others.length && room > 0 ? choice('Compare with', [['', chosen.length ? 'another run …' : 'a run …'], ...(all ? [['*', `all ${others.length} others`]] : []),
        ...others.map((n, i) => [String(i), n])], '', add) : '',
      ...chosen.map((name, i) => {
        const dot = el('i', { class: 'dot' });
        dot.style.background = `var(--series${i + 1})`;
        return el('button', { type: 'button', class: 'chip', 'aria-label': `Leave out ${name}`, onclick: () => place.set({ versus: chosen.filter((n) => n !== name) }) },
          dot, name, el('span', { 'aria-hidden': 'true' }, ' ×'));
      }),
      chosen.length ? el('button', { type: 'button', class: 'plain', onclick: () => this.comparison.show() }, 'See the comparison') : '',
      this.lost ? el('span', { class: 'lost' }, `The run ${this.lost} is not here; this is the newest.`) : '');
    if (held) (this.bar.querySelector(`[aria-label="${CSS.escape(held)}"]`) || this.bar.querySelector('[aria-label="Compare with"]'))?.focus();
  }

  moved(changed) {
    if (changed.has('run')) { this.bars(); this.load(); return; }
    if (changed.has('versus')) this.bars();
    if (this.run && !this.run.unreadable) this.refresh();
  }

  go(index, tell = true) {
    const { run, place } = this;
    if (index === null) { place.set({ finding: null, first: null, last: null }); return; }
    const finding = run.findings[index], [a, b] = finding.steps || run.steps, span = b - a + 1;
    const room = Math.max(Math.round(span * 0.08), 4);
    const first = Math.max(run.steps[0], a - room), last = Math.min(run.steps[1], b + room);
    const whole = first <= run.steps[0] && last >= run.steps[1];
    const changes = { finding: index, first: whole ? null : first, last: whole ? null : last };
    if (finding.where.length) {
      const labels = run.rows[place.group].map((r) => r.path);
      changes.rows = [...chosen(labels, finding.where)].slice(0, MOST).map((i) => labels[i]);
    }
    if (tell) place.set(changes);
    else Object.assign(place, changes);
  }

  zoom(first, last) {
    const [a, b] = this.run.steps;
    const from = Math.max(a, Math.min(first, b)), to = Math.max(from, Math.min(last, b));
    if (from <= a && to >= b) this.place.set({ first: null, last: null });
    else this.place.set({ first: from, last: to });
  }

  pick(row, add) {
    const path = this.map.labels[row], { place } = this;
    const have = [...chosen(this.map.labels, place.rows)].map((i) => this.map.labels[i]);
    if (!add) place.set({ rows: [path], finding: null });
    else place.set({ rows: have.includes(path) ? have.filter((p) => p !== path) : [...have.slice(-MOST + 1), path], finding: null });
  }

  hover(step) {
    if (step === this.step) return;
    this.step = step;
    requestAnimationFrame(() => {
      this.drill.cursor(this.step);
      if (this.compared) this.comparison.cursor(this.step);
      if (this.map.heat.view && !this.map.heat.cell) { this.map.heat.view.cursor = this.step; this.map.heat.draw(); }
    });
  }

  // Asks for the pictures of the place and draws them.
  async refresh() {
    const { run } = this;
    if (!run || run.unreadable) return;
    const asked = (this.asked += 1);
    try {
      this.heads();
      if (run.windows) await this.pictures(asked);
      else {
        this.sections.hidden = this.status.hidden = true;
      }
      if (asked === this.asked) this.done();
    } catch (error) {
      if (asked === this.asked) this.fail(error);
    }
  }

  async pictures(asked) {
    const { run, place, source } = this;
    this.sections.hidden = false;
    const width = (this.measured = this.width), columns = Math.max(100, Math.min(1000, Math.round((width - 120) / 2)));
    const [first, last] = [place.first ?? run.steps[0], place.last ?? run.steps[1]];
    const labels = run.rows[place.group].map((r) => r.path), rows = [...chosen(labels, place.rows)].slice(0, MOST);
    const view = { run: run.name, group: place.group, first, last, columns };
    const [picture, scalars] = await Promise.all([source.map({ ...view, statistic: place.statistic }), source.scalars(view)]);
    if (asked !== this.asked) return;
    // The map does not wait for the curves of layers, which take more reading: they are read while it is drawn.
    const reading = rows.length ? source.lines({ ...view, rows: rows.join(','), statistics: statisticsOf(run).join(',') }) : null;
    reading?.catch(() => {}); // told below
    this.shown = { picture, scalars, lines: null, labels, rows };
    this.status.hidden = true;
    this.redraw();
    document.body.dataset.map = asked;
    this.mark('map');
    const lines = await reading;
    if (asked !== this.asked) return;
    this.shown.lines = lines;
    this.redraw();
    await this.compare(view, picture, scalars, asked);
  }

  redraw() {
    if (!this.shown) return;
    const { picture, scalars, lines, labels, rows } = this.shown, width = this.width;
    this.map.update(this.run, picture, width, this.step);
    this.drill.update(this.run, labels, rows, scalars, lines, width, this.step);
    if (this.compared) this.comparison.update({ ...this.compared, frame: picture, rows: this.run.rows[this.place.group], scale: this.map.scale, width });
  }

  // The other runs of the comparison, which are here, in the order in which they were chosen.
  get versus() {
    const { place } = this;
    return [...new Set(place.versus)].filter((name) => name !== place.run && this.names.includes(name)).slice(0, MOST_RUNS - 1);
  }

  // Asks for the same picture of each run that is compared, and for what is to be said of each against the baseline.
  async compare(view, picture, scalars, asked) {
    const { place, source, versus } = this;
    this.comparison.node.hidden = !versus.length;
    this.compared = null;
    if (!versus.length) return;
    const runs = [this.run, ...await Promise.all(versus.map((run) => source.run({ run })))];
    const read = runs.filter((run) => !run.unreadable && run.windows);
    const base = read.find((run) => run.name === place.baseline) || this.run;
    const [a, b] = picture.edges, there = { ...view, first: a, last: b - 1, columns: picture.columns, exact: 1 };
    const unreadable = runs.filter((run) => !read.includes(run)).map((run) => run.unreadable || `${run.name} has no recorded steps.`);
    const sides = await Promise.all(read.map(async (run) => {
      const own = run === this.run, knows = run.statistics.some((s) => s.name === place.statistic);
      const [shown, lines, told] = await Promise.all([
        own ? picture : knows ? source.map({ ...there, run: run.name, statistic: place.statistic }) : null,
        own ? scalars : source.scalars({ ...there, run: run.name }), run === base ? null : this.told(base, run).catch((error) => { unreadable.push(error.message); })]);
      return { run, picture: shown, scalars: lines, told };
    }));
    if (asked !== this.asked) return;
    this.compared = { sides: sides.filter((side) => side.told !== undefined), unreadable };
    this.redraw();
  }

  // What is said of a run against another is asked for again when either has grown, and not by a zoom; while one grows,
  // the server has some twenty times as long as it took until it is asked again.
  told(base, run) {
    const pair = JSON.stringify([base.name, run.name]), ended = base.end && run.end;
    const state = JSON.stringify([base, run].map((one) => [one.windows, one.judged, Boolean(one.end)]));
    const had = this.answers.get(pair), begun = performance.now();
    if (had && (had.state === state || (!ended && begun < had.again))) return had.answer;
    const made = { state, again: Infinity, answer: this.source.compare({ run: base.name, versus: run.name }) };
    made.answer.then(() => { made.again = performance.now() + PATIENCE * (performance.now() - begun); }, () => this.answers.delete(pair));
    this.answers.set(pair, made);
    return made.answer;
  }

  async pulse() {
    if (this.busy) return;
    this.busy = true;
    try {
      if (!this.run) { await this.listing(); return; }
      const now = await this.source.pulse({ run: this.place.run });
      if (now.windows !== (this.run.windows || 0) || now.ended !== Boolean(this.run.end) || now.judged !== this.run.judged) await this.load();
      this.beats = (this.beats || 0) + 1;
      if (this.beats % 3 === 0) { this.names = (await this.source.runs()).runs; this.bars(); }
    } catch { /* TensorBoard is away; the next beat asks again. */ } finally { this.busy = false; }
  }
}
