// Answers from within a report: pictures of the whole run lie in the page, and parts of them are cut out here.
import { decode, MISSING, OVER, STATE, unpack, ZERO } from './wire.js';

const ORDER = [STATE.nonfinite, STATE.fine, STATE.zero, STATE.missing];

export async function embedded(content) {
  const pictures = {};
  await Promise.all(Object.entries(content.pictures).map(async ([key, text]) => { pictures[key] = await message(text); }));
  const of = (run, what) => {
    const found = pictures[`${run}\n${what}`];
    if (!found) throw new Error('This report does not hold that statistic. TensorBoard shows it.');
    return found;
  };
  return {
    live: false,
    runs: async () => ({ runs: content.names, versus: content.versus }),
    run: async ({ run }) => content.runs[run],
    compare: async ({ run, versus }) => {
      const told = content.compared[`${run}\n${versus}`], reverse = content.compared[`${versus}\n${run}`];
      if (!told && !reverse) throw new Error(`This report does not hold the comparison of ${versus} with ${run}. TensorBoard shows it.`);
      return told || turned(reverse);
    },
    map: async (query) => cut(of(query.run, query.statistic), query),
    scalars: async (query) => {
      const { arrays, edges } = of(query.run, 'scalars'), names = Object.keys(arrays).filter((name) => name !== 'extents');
      const [from, to] = inside(edges, query.first, query.last), result = {};
      for (const name of names) {
        const n = arrays[name].shape[1];
        result[name] = Float32Array.from([0, 1, 2].flatMap((k) => [...arrays[name].subarray(k * n + from, k * n + to)]));
        result[name].shape = [3, to - from];
      }
      return { edges: edges.slice(from, to + 1), arrays: result };
    },
    lines: async (query) => {
      const rows = query.rows.split(',').map(Number), arrays = {};
      let edges = [];
      for (const name of query.statistics.split(',')) {
        const part = cut(of(query.run, name), query), { columns } = part;
        edges = Array.from({ length: columns + 1 }, (_, c) => part.edges[0] + (c / columns) * (part.edges[1] - part.edges[0]));
        const pick = (plane, c, i) => plane[c * part.rows + rows[i]];
        arrays[name] = Float32Array.from(['low', 'mean', 'high'].flatMap((plane) => Array.from({ length: columns * rows.length },
          (_, at) => decode(pick(part.arrays[plane], Math.floor(at / rows.length), at % rows.length), part.factor))));
        arrays[`${name}/states`] = Uint8Array.from({ length: columns * rows.length },
          (_, at) => pick(part.arrays.states, Math.floor(at / rows.length), at % rows.length));
      }
      return { rows, edges, arrays };
    },
  };
}

// The same comparison with the other run as the baseline.
const turned = (told) => ({ ...told, good: told.good === 'run' ? 'versus' : 'run', passport: told.passport.map(([name, a, b]) => [name, b, a]) });

async function message(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return unpack(await new Response(stream).arrayBuffer());
}

// The columns of `edges` that hold the steps asked for.
function inside(edges, first, last) {
  let from = edges.findIndex((edge, i) => i && edge > first);
  from = from < 0 ? 0 : from - 1;
  let to = edges.findIndex((edge) => edge > last);
  if (to < 0) to = edges.length - 1;
  return [from, Math.max(to, from + 1)];
}

// A picture of some of the steps of another, at most so many columns; several columns become one with all their peaks.
function cut(picture, { first, last, columns, exact }) {
  const { rows, arrays } = picture, [a, b] = picture.edges, width = (b - a) / picture.columns;
  const begin = exact ? first : Math.max(a, a + Math.floor((first - a) / width) * width);
  const end = exact ? last + 1 : Math.min(b, a + Math.ceil((last + 1 - a) / width) * width);
  const count = Math.max(1, Math.min(columns, exact ? columns : Math.round((end - begin) / width)));
  const planes = { low: [Int16Array, lowest], mean: [Int16Array, middle], high: [Int16Array, highest], states: [Uint8Array, worst] };
  const result = { extents: new Float64Array(2 * count) };
  for (const [name, [Type]] of Object.entries(planes)) result[name] = new Type(count * rows);
  for (let c = 0; c < count; c += 1) {
    const x = begin + (c * (end - begin)) / count, next = begin + ((c + 1) * (end - begin)) / count;
    const from = Math.min(picture.columns - 1, Math.max(0, Math.floor((x - a) / width + 1e-6)));
    const to = Math.min(picture.columns, Math.max(from + 1, Math.ceil((next - a) / width - 1e-6)));
    const outside = next <= a || x >= b;
    result.extents[2 * c] = arrays.extents[2 * from];
    result.extents[2 * c + 1] = arrays.extents[2 * to - 1];
    for (let row = 0; row < rows; row += 1) {
      for (const [name, [, merge]] of Object.entries(planes)) {
        const codes = [];
        for (let k = from; k < to; k += 1) codes.push(arrays[name][k * rows + row]);
        result[name][c * rows + row] = outside ? (name === 'states' ? STATE.missing : MISSING) : merge(codes);
      }
    }
  }
  return { ...picture, edges: [begin, end], columns: count, arrays: result };
}

const known = (codes) => codes.filter((code) => code !== MISSING);
const lowest = (codes) => known(codes).reduce((a, b) => (order(b) < order(a) ? b : a), known(codes)[0] ?? MISSING);
const highest = (codes) => known(codes).reduce((a, b) => (order(b) > order(a) ? b : a), known(codes)[0] ?? MISSING);
const order = (code) => (code === ZERO ? -Infinity : code);
const worst = (states) => ORDER.find((state) => states.includes(state));

function middle(codes) {
  const finite = codes.filter((code) => code > ZERO && code < OVER);
  return finite.length ? Math.round(finite.reduce((a, b) => a + b) / finite.length) : known(codes)[0] ?? MISSING;
}
