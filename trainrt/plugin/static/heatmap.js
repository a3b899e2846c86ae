// One heat map: rows x steps, a colour a cell. Draws itself, and tells what the pointer and the keys ask for.
import { Axis, draggable, font, surface } from './axis.js';
import { el } from './dom.js';
import { fit, short, steps } from './numbers.js';
import { BAND } from './scale.js';
import { colour } from './theme.js';
import { decode, STATE } from './wire.js';

const TOP = 14, BOTTOM = 26;

export class Heatmap {
  // `does`: hover(step or null), pick(row, add), zoom(first, last), out().
  constructor(label, does) {
    this.does = does;
    this.cell = null;
    this.canvas = el('canvas', {
      tabindex: 0, role: 'application', 'aria-roledescription': 'heat map', 'aria-label': label,
      'aria-describedby': 'keys',
    });
    this.tip = el('div', { class: 'tip', hidden: true });
    this.said = el('div', { class: 'unseen', 'aria-live': 'polite' });
    this.node = el('div', { class: 'heatmap' }, this.canvas, this.tip, this.said);
    draggable(this.canvas, () => this.axis, {
      zoom: (first, last) => does.zoom(first, last),
      click: (event) => { const cell = this.at(event); if (cell) does.pick(cell.row, event.shiftKey || event.ctrlKey || event.metaKey); },
      band: (band) => { this.band = band; this.draw(); },
    });
    this.canvas.addEventListener('pointermove', (event) => this.point(this.at(event), false));
    this.canvas.addEventListener('pointerleave', () => this.point(null, false));
    this.canvas.addEventListener('dblclick', () => does.out());
    this.canvas.addEventListener('keydown', (event) => this.key(event));
    this.canvas.addEventListener('blur', () => this.point(null, false));
  }

  // `view`: picture, order (rows from top to bottom), labels, scale, show ("mean", "low", "high"), chosen, marks, width;
  // and, where many maps are shown, name, left (the gutter; 0: no labels), tall (pixels that many rows may take).
  update(view) {
    this.view = view;
    if (view.name) this.canvas.setAttribute('aria-label', view.name);
    this.image = paint(view);
    this.draw();
  }

  get rowHeight() {
    const rows = this.view.order.length;
    return rows <= 6 ? 34 : rows <= 14 ? 24 : rows <= 24 ? 18 : Math.max(2, Math.min(16, (this.view.tall || 460) / rows));
  }

  draw() {
    if (!this.view) return;
    const { picture, order, labels, width, left, chosen, marks } = this.view;
    const [first, stop] = picture.edges;
    const axis = (this.axis = new Axis(width, first, stop - 1, left));
    const high = this.rowHeight, tall = Math.round(order.length * high);
    const context = surface(this.canvas, width, TOP + tall + BOTTOM);
    hatch(context, axis.left, TOP, axis.width, tall);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, axis.left, TOP, axis.width, tall);
    if (high >= 8) {
      context.fillStyle = colour('page');
      for (let i = 1; i < order.length; i += 1) context.fillRect(axis.left, Math.round(TOP + i * high) - 0.5, axis.width, 1);
    }
    axis.drawTicks(context, TOP + tall + 2);
    if (axis.left) this.drawLabels(context, order, labels, chosen, high);
    for (const mark of marks) {
      const a = Math.max(axis.x(mark.first), axis.left), b = Math.min(axis.x(mark.last + 1), axis.left + axis.width);
      if (b < axis.left || a > axis.left + axis.width) continue;
      context.fillStyle = colour(mark.colour);
      context.globalAlpha = mark.current ? 1 : 0.45;
      context.fillRect(a, mark.current ? 3 : 6, Math.max(b - a, 3), mark.current ? 6 : 3);
      context.globalAlpha = 1;
    }
    if (this.band) {
      context.fillStyle = colour('accent');
      context.globalAlpha = 0.18;
      context.fillRect(this.band[0], TOP, this.band[1] - this.band[0], tall);
      context.globalAlpha = 1;
      context.strokeStyle = colour('accent');
      context.strokeRect(this.band[0] + 0.5, TOP + 0.5, this.band[1] - this.band[0], tall - 1);
    }
    const step = this.cell ? this.cell.step : this.view.cursor;
    if (step !== null && step !== undefined && step >= first && step < stop) {
      context.fillStyle = colour('ink');
      context.globalAlpha = 0.55;
      context.fillRect(Math.round(axis.x(step + 0.5)), TOP, 1, tall);
      context.globalAlpha = 1;
      if (this.cell) {
        context.strokeStyle = colour('ink');
        context.lineWidth = 1.5;
        const at = order.indexOf(this.cell.row);
        context.strokeRect(axis.left, TOP + at * high, axis.width, Math.max(high, 3));
      }
    }
  }

  drawLabels(context, order, labels, chosen, high) {
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    const every = Math.max(1, Math.ceil(13 / high));
    order.forEach((row, i) => {
      const y = TOP + (i + 0.5) * high, picked = chosen.has(row);
      if (picked) {
        context.fillStyle = colour('accent');
        context.fillRect(this.axis.left - 5, TOP + i * high, 3, Math.max(high - 1, 2));
      }
      if (i % every && !(picked && chosen.size < 4)) return;
      if (!picked && every > 1 && [...chosen].some((c) => chosen.size < 4 && Math.abs(order.indexOf(c) - i) < every)) return;
      context.font = font(high < 14 ? 10.5 : 12, picked ? 650 : 400);
      context.fillStyle = colour(picked ? 'ink' : 'soft');
      context.fillText(fit(context, labels[row], this.axis.left - 14), this.axis.left - 10, y);
    });
  }

  at(event) {
    if (!this.axis) return null;
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, i = Math.floor((event.clientY - box.top - TOP) / this.rowHeight);
    if (i < 0 || i >= this.view.order.length) return null;
    if (!this.axis.holds(x)) return x < this.axis.left ? { row: this.view.order[i], step: null } : null;
    return { row: this.view.order[i], step: this.axis.step(x) };
  }

  point(cell, say) {
    this.cell = cell && cell.step !== null ? cell : null;
    this.does.hover(this.cell ? this.cell.step : null);
    this.draw();
    this.tip.hidden = !this.cell;
    if (!this.cell) return;
    const told = this.tell(this.cell);
    this.tip.replaceChildren(el('strong', {}, told.where), el('span', {}, told.when), el('span', { class: 'value' }, told.what),
      ...(told.range ? [el('span', {}, told.range)] : []));
    const x = this.axis.x(this.cell.step), y = TOP + this.view.order.indexOf(this.cell.row) * this.rowHeight;
    const room = this.view.width - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(x + 14, room))}px`;
    this.tip.style.top = `${y + this.rowHeight + 10}px`;
    if (say) this.said.textContent = `${told.where}, ${told.when}: ${told.what}. ${told.range || ''}`;
  }

  // What a cell holds, in words.
  tell({ row, step }) {
    const { picture, labels, describe } = this.view;
    const [first, stop] = picture.edges, c = Math.min(Math.floor(((step - first) / (stop - first)) * picture.columns), picture.columns - 1);
    const at = c * picture.rows + row, { low, mean, high, states, extents } = picture.arrays;
    const value = (plane) => {
      const x = decode(plane[at], picture.factor);
      return picture.kind === 'ratio' || picture.kind === 'log' ? 10 ** x : x;
    };
    const state = states[at];
    const what = state === STATE.missing ? 'not measured' : describe(value(mean), state);
    const spread = mean[at] !== low[at] || mean[at] !== high[at];
    return {
      where: labels[row], when: steps(extents[2 * c], extents[2 * c + 1]), what,
      range: state !== STATE.missing && spread ? `lowest ${short(value(low))}, highest ${short(value(high))}` : '',
    };
  }

  key(event) {
    const { order, picture } = this.view, [first, stop] = picture.edges;
    const cell = this.cell || { row: order[0], step: Math.floor(first) };
    const stride = Math.max(1, Math.round(((stop - first) / picture.columns) * (event.shiftKey ? 20 : 1)));
    const move = (rows, by) => {
      const at = Math.max(0, Math.min(order.length - 1, order.indexOf(cell.row) + rows));
      const step = Math.max(Math.ceil(first), Math.min(Math.ceil(stop) - 1, cell.step + by));
      this.point({ row: order[at], step }, true);
    };
    const span = stop - first;
    const zoom = (share) => {
      const a = Math.round(cell.step - (span * share) / 2);
      this.does.zoom(Math.max(0, a), Math.max(0, Math.round(a + span * share) - 1));
    };
    const keys = {
      ArrowUp: () => move(-1, 0), ArrowDown: () => move(1, 0), ArrowLeft: () => move(0, -stride), ArrowRight: () => move(0, stride),
      Home: () => move(0, -span), End: () => move(0, span), Enter: () => this.does.pick(cell.row, event.shiftKey),
      ' ': () => this.does.pick(cell.row, event.shiftKey), '+': () => zoom(0.5), '=': () => zoom(0.5), '-': () => zoom(2),
      Escape: () => this.does.out(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }
}

// The cells as an image, three lines a row. The top line shows a peak that the mean hides: steps that were too high.
function paint({ picture, order, scale, show }) {
  const { rows, columns, factor, arrays } = picture;
  const image = new ImageData(columns, order.length * 3), data = image.data;
  const plane = arrays[show] || arrays.mean, logarithmic = picture.kind === 'ratio';
  order.forEach((row, i) => {
    for (let c = 0; c < columns; c += 1) {
      const at = c * rows + row, state = arrays.states[at];
      if (state === STATE.missing) continue;
      const value = decode(plane[at], factor);
      let rgb = state === STATE.nonfinite ? scale.special.nonfinite
        : state === STATE.zero || (value === -Infinity && show !== 'mean') ? scale.special.zero : scale.colour(value);
      if (Number.isNaN(value) && state === STATE.fine) continue;
      const peak = logarithmic && state === STATE.fine && show === 'mean' && value <= BAND[1] && decode(arrays.high[at], factor) > BAND[1];
      for (let k = 0; k < 3; k += 1) {
        if (k === 0 && peak) rgb = scale.colour(decode(arrays.high[at], factor));
        else if (k === 1 && peak) rgb = scale.colour(value);
        const to = ((i * 3 + k) * columns + c) * 4;
        [data[to], data[to + 1], data[to + 2]] = rgb;
        data[to + 3] = 255;
      }
    }
  });
  const canvas = new OffscreenCanvas(columns, Math.max(order.length * 3, 1));
  canvas.getContext('2d').putImageData(image, 0, 0);
  return canvas;
}

function hatch(context, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = colour('panel');
  context.fillRect(x, y, width, height);
  context.strokeStyle = colour('hatch');
  context.lineWidth = 1;
  for (let at = x - height; at < x + width; at += 6) {
    context.beginPath();
    context.moveTo(at, y + height);
    context.lineTo(at + height, y);
    context.stroke();
  }
  context.restore();
}

