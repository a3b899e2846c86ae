// Colours for numbers. Blue is low and orange is high, which every kind of colour vision tells apart; they also differ
// in lightness from the band between them. Zero, not finite and not measured have looks of their own.
import { isDark } from './theme.js';
import { power, short } from './numbers.js';

// log10(update/weight). From 1e-4 to 1e-1 weights usually learn (the rule `learning_rate` uses the same band).
export const BAND = [-4, -1];

const RATIO = {
  light: [[-8, '#0b2c6b'], [-6, '#2a6fb8'], [-4.5, '#7fb4df'], [-4, '#b5d5ea'], [-3.9, '#d8ece0'], [-3, '#e6f2e4'],
    [-2, '#eaf1db'], [-1.1, '#f3ecc8'], [-1, '#fbc98a'], [-0.5, '#ee8434'], [0, '#cf4b0a'], [1, '#7a2100']],
  dark: [[-8, '#b5d6ff'], [-6, '#5aa2ee'], [-4.5, '#2f6aa8'], [-4, '#2a5378'], [-3.9, '#20403a'], [-3, '#244539'],
    [-2, '#2c4a35'], [-1.1, '#4a4a2a'], [-1, '#8a5320'], [-0.5, '#c96a1e'], [0, '#f08c3a'], [1, '#ffd3a3']],
};
const SIGNED = {
  light: [[-1, '#0b3d8c'], [-0.5, '#5f9fd6'], [0, '#f1f1ee'], [0.5, '#ee9a52'], [1, '#8f2f00']],
  dark: [[-1, '#a9d0ff'], [-0.5, '#3f7fc4'], [0, '#26282e'], [0.5, '#c0661d'], [1, '#ffcf9c']],
};
const PLAIN = {
  light: [[0, '#f3f1ea'], [0.25, '#c9d6e3'], [0.5, '#8fabc9'], [0.75, '#4f74a3'], [1, '#1d3766']],
  dark: [[0, '#22262e'], [0.25, '#2c4566'], [0.5, '#3f6ea8'], [0.75, '#74a9e0'], [1, '#d3e8ff']],
};

export const SPECIAL = {
  light: { zero: [24, 20, 30], nonfinite: [204, 0, 118] },
  dark: { zero: [0, 0, 0], nonfinite: [255, 92, 184] },
};

const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function ramp(stops) {
  const at = stops.map(([x]) => x), rgb = stops.map(([, hex]) => parse(hex));
  return (x) => {
    if (!(x > at[0])) return rgb[0];
    const i = at.findIndex((edge) => x < edge);
    if (i < 0) return rgb[rgb.length - 1];
    const part = (x - at[i - 1]) / (at[i] - at[i - 1]);
    return rgb[i].map((c, k) => rgb[i - 1][k] + part * (c - rgb[i - 1][k]));
  };
}

// A scale for values of a kind between `low` and `high` (of log10 for "ratio" and "log"): colour(x) -> [r, g, b].
export function scaleOf(kind, low, high) {
  const theme = isDark() ? 'dark' : 'light';
  const special = SPECIAL[theme];
  if (kind === 'ratio') {
    return {
      kind, special, domain: [-8, 1], colour: table(ramp(RATIO[theme]), -8, 1),
      ticks: [[-8, power(-8)], [-6, power(-6)], [-4, power(-4)], [-3, power(-3)], [-1, power(-1)], [1, '10']],
      zones: [[-8, -4, 'too low'], [-4, -1, 'fine'], [-1, 1, 'too high']],
    };
  }
  if (kind === 'signed' || kind === 'difference') {
    const far = Math.max(Math.abs(low), Math.abs(high)) || 1;
    const inside = ramp(SIGNED[theme]);
    const text = kind === 'difference' ? (x) => `×${short(10 ** x)}` : short;
    return {
      kind, special, domain: [-far, far], colour: table((x) => inside(x / far), -far, far),
      ticks: [[-far, text(-far)], [0, kind === 'difference' ? 'same' : '0'], [far, text(far)]], zones: [],
    };
  }
  if (kind === 'share') { low = 0; high = 1; }
  if (!(high > low)) { low -= 0.5; high += 0.5; }
  const inside = ramp(PLAIN[theme]), span = high - low;
  const text = kind === 'log' ? (x) => short(10 ** x) : short;
  return {
    kind, special, domain: [low, high], colour: table((x) => inside((x - low) / span), low, high),
    ticks: [0, 0.5, 1].map((p) => [low + p * span, kind === 'share' ? `${p * 100} %` : text(low + p * span)]), zones: [],
  };
}

// 512 colours, looked up: a map asks for a quarter of a million.
function table(colour, low, high) {
  const size = 512, known = Array.from({ length: size }, (_, i) => colour(low + (i / (size - 1)) * (high - low)));
  return (x) => known[Math.max(0, Math.min(size - 1, Math.round(((x - low) / (high - low)) * (size - 1))))];
}
