// Messages of a JSON header and arrays; wire.py is the other half and describes them.
const TYPES = { i2: Int16Array, u1: Uint8Array, f4: Float32Array, f8: Float64Array };

export const MISSING = -32768, ZERO = -32767, OVER = 32767;
export const STATE = { fine: 0, missing: 1, zero: 2, nonfinite: 3 };

export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const [name, [dtype, shape, at]] of Object.entries(header.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1);
    arrays[name] = new TYPES[dtype](buffer, 4 + length + at, size);
    arrays[name].shape = shape;
  }
  return { ...header, arrays };
}

// The number behind a code: NaN where nothing was measured, and infinities.
export function decode(code, factor) {
  if (code === MISSING) return NaN;
  if (code === ZERO) return -Infinity;
  if (code === OVER) return Infinity;
  return code / factor;
}
