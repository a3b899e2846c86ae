// Two runs' pictures as one: the other's with our rows, and the difference of both.
import { decode, MISSING, STATE } from './wire.js';

const PLANES = [['low', Int16Array], ['mean', Int16Array], ['high', Int16Array], ['states', Uint8Array]];

// Where each of our rows is among theirs, -1 where it is not. Keras numbers layers through a process (`dense_2` is the
// `dense` of a second model), so rows that share no name are taken in order where there are as many, of the same sizes.
export function align(ours, theirs) {
  const at = new Map(theirs.map((row, i) => [row.path, i])), found = ours.map((row) => at.get(row.path) ?? -1);
  const alike = ours.length === theirs.length && ours.every((row, i) => row.size === theirs[i].size);
  return found.every((i) => i < 0) && alike ? ours.map((_, i) => i) : found;
}

// The other run's picture with our rows, in as many columns as ours.
export function match(mine, yours, at) {
  const arrays = { extents: yours.arrays.extents }, columns = Math.min(mine.columns, yours.columns);
  for (const [name, make] of PLANES) {
    const absent = name === 'states' ? STATE.missing : MISSING, from = yours.arrays[name];
    const plane = (arrays[name] = new make(columns * at.length));
    for (let c = 0, to = 0; c < columns; c += 1) for (const row of at) plane[to++] = row < 0 ? absent : from[c * yours.rows + row];
  }
  return { ...yours, rows: at.length, columns, arrays };
}

// `other` over `base` where the scale is a logarithm, otherwise their difference. Both have the same rows and edges.
export function subtract(base, other) {
  const logarithmic = base.kind === 'ratio' || base.kind === 'log', size = Math.min(base.arrays.mean.length, other.arrays.mean.length);
  const values = Float32Array.from({ length: size }, (_, i) => decode(other.arrays.mean[i], other.factor) - decode(base.arrays.mean[i], base.factor));
  const far = values.reduce((a, v) => (Number.isFinite(v) ? Math.max(a, Math.abs(v)) : a), 0) || 1, factor = 32000 / far;
  const mean = Int16Array.from(values, (v) => (Number.isFinite(v) ? Math.round(v * factor) : MISSING));
  const states = Uint8Array.from(mean, (code, i) => (Math.max(base.arrays.states[i], other.arrays.states[i]) === STATE.nonfinite ? STATE.nonfinite
    : code === MISSING ? STATE.missing : STATE.fine));
  return { ...other, kind: logarithmic ? 'difference' : 'signed', factor, arrays: { ...other.arrays, low: mean, mean, high: mean, states } };
}

// The lines in which any of the passports differs from the baseline's: [name, of the baseline, of each other].
// `told` holds the lines [name, baseline's, other's] of each other run.
export function passports(told) {
  const base = new Map(told.flatMap((lines) => lines.map(([name, a]) => [name, a])));
  const others = told.map((lines) => new Map(lines.map(([name, , b]) => [name, b])));
  return [...base].map(([name, a]) => [name, a, ...others.map((lines) => lines.get(name) ?? a)]);
}
