// The axis of steps that the map and all charts share: same gutter at the left, same pixels for the same step. A map
// beside another, whose rows it shares, has no gutter.
import { colour } from './theme.js';
import { count, ticks } from './numbers.js';

export const RIGHT = 14;
export const gutter = (width) => (width < 620 ? 104 : 190);

export class Axis {
  constructor(width, first, last, left = gutter(width)) {
    this.left = left;
    this.width = Math.max(width - this.left - RIGHT, 40);
    this.first = first;
    this.last = last;
  }

  // A step occupies [x(step), x(step + 1)].
  x(step) { return this.left + ((step - this.first) / (this.last + 1 - this.first)) * this.width; }

  step(x) {
    const part = Math.min(Math.max((x - this.left) / this.width, 0), 0.999999);
    return Math.floor(this.first + part * (this.last + 1 - this.first));
  }

  holds(x) { return x >= this.left && x <= this.left + this.width; }

  ticks() { return ticks(this.first, this.last, this.width); }

  drawTicks(context, y) {
    context.fillStyle = colour('soft');
    context.font = font(11);
    context.textBaseline = 'top';
    for (const at of this.ticks()) {
      const x = Math.round(this.x(at)) + 0.5;
      context.fillRect(x - 0.5, y, 1, 4);
      const text = count(at), half = context.measureText(text).width / 2;
      const end = this.left + this.width;
      context.textAlign = x - half < this.left ? 'left' : x + half > end ? 'right' : 'center';
      context.fillText(text, x - half < this.left ? this.left : x + half > end ? end : x, y + 7);
    }
  }
}

export const font = (size, weight = 400) =>
  `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;

// A canvas as sharp as the screen; returns its context in CSS pixels.
export function surface(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// Dragging over a canvas chooses steps; a press without a drag is a click.
export function draggable(canvas, axis, { zoom, click, band }) {
  let from = null;
  const x = (event) => event.clientX - canvas.getBoundingClientRect().left;
  canvas.addEventListener('pointerdown', (event) => {
    if (event.button !== 0 || !axis()) return;
    from = x(event);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (from === null || !axis() || Math.abs(x(event) - from) < 5) return;
    if (!canvas.hasPointerCapture(event.pointerId)) canvas.setPointerCapture(event.pointerId);
    band([Math.min(from, x(event)), Math.max(from, x(event))]);
  });
  const end = (event) => {
    if (from === null || !axis()) return;
    const a = Math.min(from, x(event)), b = Math.max(from, x(event));
    from = null;
    band(null);
    if (event.type !== 'pointerup') return;
    if (b - a < 5) click(event);
    else zoom(axis().step(a), axis().step(b));
  };
  canvas.addEventListener('pointerup', end);
  canvas.addEventListener('pointercancel', end);
}
