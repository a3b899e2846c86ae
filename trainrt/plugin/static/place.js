// The place one looks at: run, statistic, steps, rows. It lives in the address, so that it can be linked to and kept.
const EMPTY = {
  run: '', versus: [], baseline: '', statistic: 'update_ratio', group: 'layers', order: 'depth', show: 'mean',
  first: null, last: null, rows: [], finding: null,
};
const LISTS = new Set(['versus', 'rows']);
const NUMBERS = new Set(['first', 'last', 'finding']);

export class Place {
  constructor() {
    Object.assign(this, structuredClone(EMPTY));
    this.listeners = [];
    this.read();
    outer().addEventListener('hashchange', () => { if (this.read()) this.tell(new Set(Object.keys(EMPTY))); });
  }

  on(listener) { this.listeners.push(listener); }

  set(changes) {
    const changed = new Set();
    for (const [name, value] of Object.entries(changes)) {
      if (JSON.stringify(this[name]) !== JSON.stringify(value)) { this[name] = value; changed.add(name); }
    }
    if (!changed.size) return;
    this.write();
    this.tell(changed);
  }

  tell(changed) { for (const listener of this.listeners) listener(changed); }

  // Takes the place from an address such as #trainrt&run=a%2Fb&finding=0; says whether it moved.
  read() {
    const hash = address();
    if (hash === this.written) return false;
    const given = new URLSearchParams(hash.replace(/^#[^&]*&?/, ''));
    const next = structuredClone(EMPTY);
    for (const [key, value] of given) {
      const name = key.replace(/^p\.trainrt\./, '');
      if (!Object.hasOwn(EMPTY, name)) continue;
      if (LISTS.has(name)) next[name].push(value);
      else if (NUMBERS.has(name)) next[name] = /^\d{1,15}$/.test(value) ? Number(value) : null;
      else next[name] = value;
    }
    Object.assign(this, next);
    this.linked = [...given.keys()].length > 0;
    return true;
  }

  write() {
    const text = new URLSearchParams();
    for (const [name, empty] of Object.entries(EMPTY)) {
      const value = this[name];
      if (LISTS.has(name)) value.forEach((one) => text.append(name, one));
      else if (value !== null && value !== empty) text.append(name, value);
    }
    this.written = `#trainrt${text.size ? `&${text}` : ''}`;
    try {
      outer().history.replaceState(outer().history.state, '', this.written);
    } catch { /* A report opened from disk may not have an address of its own. */ }
  }
}

function outer() {
  try {
    void window.parent.location.hash;
    return window.parent;
  } catch {
    return window;
  }
}

function address() { return outer().location.hash; }
