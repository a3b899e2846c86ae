// What the colours of a map mean.
import { el } from './dom.js';

const css = (rgb) => `rgb(${rgb.map(Math.round).join(',')})`;

export function legend(scale) {
  const [low, high] = scale.domain, part = (x) => ((x - low) / (high - low)) * 100;
  const stops = Array.from({ length: 57 }, (_, i) => css(scale.colour(low + (i / 56) * (high - low))));
  const bar = el('div', { class: 'bar' });
  bar.style.background = `linear-gradient(90deg, ${stops.join(',')})`;
  const zones = scale.zones.map(([a, b, text]) => at(el('span', { class: 'zone' }, text), part((a + b) / 2)));
  const ticks = scale.ticks.map(([x, text]) => at(el('span', { class: 'tick' }, text), part(x)));
  const edges = scale.zones.slice(1).map(([a]) => at(el('i', {}), part(a)));
  bar.append(...edges);
  const swatch = (style, text) => {
    const box = el('i', { class: `swatch ${style}` });
    if (scale.special[style]) box.style.background = css(scale.special[style]);
    return el('span', { class: 'special' }, box, text);
  };
  const zero = scale.kind === 'ratio' || scale.kind === 'log';
  return el('div', { class: 'legend' },
    el('div', { class: 'scale' }, el('div', { class: 'zones' }, ...zones), bar, el('div', { class: 'ticks' }, ...ticks)),
    zero ? swatch('zero', 'exactly zero') : null, swatch('nonfinite', 'NaN or infinite'), swatch('missing', 'not measured'));
}

function at(node, percent) {
  node.style.left = `${percent}%`;
  return node;
}
