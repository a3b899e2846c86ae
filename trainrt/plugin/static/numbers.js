// Numbers and names as people read them.
const SUPERSCRIPT = { '-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵', 6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹' };

export const power = (n) => `10${[...String(n)].map((c) => SUPERSCRIPT[c]).join('')}`;

export function short(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return 'not measured';
  if (!Number.isFinite(x)) return x > 0 ? '∞' : '-∞';
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) {
    const [digits, exponent] = x.toExponential(1).split('e');
    return `${digits.replace(/\.0$/, '')}·${power(Number(exponent))}`;
  }
  return String(Number(x.toPrecision(3)));
}

export const count = (n) => Number(n).toLocaleString('en-US');

export function duration(seconds) {
  if (typeof seconds !== 'number' || !(seconds >= 0)) return '';
  if (seconds < 90) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Number((seconds / 3600).toPrecision(2))} h`;
}

export const steps = (first, last) =>
  first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`;

export const words = (name) => name.replaceAll('_', ' ');

const TITLES = {
  update_ratio: 'update / weight', gradient_ratio: 'gradient / weight', step_s: 'seconds a step', input_wait_s: 'seconds a step waits for its batch',
  between_s: 'seconds between calls',
  unchanged_share: 'unchanged elements', rounded_share: 'rounded away', norm_share: 'share of the global norm',
};

// Of what the machine told: title, unit ("share", or what a value is divided by).
export const DEVICE = {
  cpu_cores: ['process, cores busy'], machine_cpu: ['machine, busy', 'share'], rss_bytes: ['process, memory in GiB', 2 ** 30],
  utilisation: ['busy', 'share'], memory_bytes: ['memory in GiB', 2 ** 30], power_w: ['power in W'],
  temperature_c: ['temperature in °C'], sm_mhz: ['SM clock in MHz'],
};
export function telemetry(name) {
  const parts = name.split('/'), [text, unit] = DEVICE[parts[parts.length - 1]] || [words(parts[parts.length - 1])];
  const card = /^gpu\d+$/.test(parts[1]) ? `GPU ${parts[1].slice(3)}, ` : '';
  return { title: `${card}${text}`.replace(/^./, (c) => c.toUpperCase()), unit: unit === 'share' ? unit : '', divisor: Number(unit) || 1 };
}
export const title = (name) => TITLES[name] || words(name);

// Round steps inside [first, last], about one per `room` pixels.
export function ticks(first, last, width, room = 90) {
  const span = Math.max(last - first, 1), rough = (span * room) / Math.max(width, 1);
  const unit = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const stride = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough) || unit * 10;
  const result = [];
  for (let at = Math.ceil(first / stride) * stride; at <= last; at += stride) result.push(at);
  return result;
}

// A name that fits, its middle left out: beginnings tell the block and ends tell the layer, which matter more if room is short.
export function fit(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let keep = text.length;
  while (keep > 2) {
    keep -= 1;
    const head = Math.ceil(keep * (width < 120 ? 0.1 : 0.4)), tail = keep - head;
    const cut = `${text.slice(0, head)}…${text.slice(text.length - tail)}`;
    if (context.measureText(cut).width <= width) return cut;
  }
  return '…';
}
