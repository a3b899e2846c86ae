// Where the page gets its answers from: TensorBoard, over its own origin. `embedded.js` answers from within a report.
import { unpack } from './wire.js';

export function remote(base) {
  async function ask(route, query) {
    const text = new URLSearchParams(Object.entries(query).filter(([, v]) => v !== null && v !== undefined));
    const response = await fetch(`${base}${route}?${text}`);
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error || `TensorBoard answered ${response.status}.`);
  }
  const json = (route) => async (query = {}) => (await ask(route, query)).json();
  const binary = (route) => async (query) => unpack(await (await ask(route, query)).arrayBuffer());
  return {
    live: true,
    runs: json('runs'), run: json('run'), pulse: json('pulse'), compare: json('compare'),
    map: binary('map'), lines: binary('lines'), scalars: binary('scalars'),
  };
}
