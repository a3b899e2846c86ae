// Where the page gets its answers from: TensorBoard, over its own origin. `embedded.js` answers from within a report.
import { unpack } from './wire.js';

// `first`: a promise of what index.js asked for before this module was there, see the route of that name.
export function remote(base, first = null) {
  const early = opened(first);
  async function ask(route, query) {
    const text = new URLSearchParams(Object.entries(query).filter(([, v]) => v !== null && v !== undefined));
    const response = await fetch(`${base}${route}?${text}`);
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error || `TensorBoard answered ${response.status}.`);
  }
  // Each part of the first answer is given once: who asks again wants to know what is new.
  const once = (route, answer) => async (query = {}) => (await early).take(route, query) ?? answer(query);
  const json = (route) => once(route, async (query) => (await ask(route, query)).json());
  const binary = (route) => once(route, async (query) => unpack(await (await ask(route, query)).arrayBuffer()));
  return {
    live: true,
    runs: json('runs'), run: json('run'), pulse: json('pulse'), compare: json('compare'),
    map: binary('map'), lines: binary('lines'), scalars: binary('scalars'),
  };
}

async function opened(first) {
  let told = null;
  try {
    const buffer = await first;
    told = buffer && unpack(buffer);
  } catch { /* Not readable: every part is asked for by itself, and says what is wrong. */ }
  if (!told) return { take: () => null };
  const { view, arrays } = told, parts = new Map([['runs', () => ({ runs: told.runs })]]);
  if (told.run) parts.set('run', () => told.run);
  for (const [name, bytes] of Object.entries(arrays)) {
    parts.set(name, () => unpack(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)));
  }
  // The number of columns was guessed before there was a page; a picture of some more or fewer is stretched.
  const asked = { runs: [], run: ['run'], map: ['run', 'group', 'first', 'last', 'statistic'], scalars: ['run', 'first', 'last'] };
  return {
    take(route, query) {
      const part = parts.get(route);
      if (!part && route === 'run') parts.clear(); // the run has changed, or another one is looked at
      if (!part || !asked[route].every((name) => query[name] === view[name])) return null;
      parts.delete(route);
      return part();
    },
  };
}
