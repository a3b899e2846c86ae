// Elements made of attributes and text. Text is only ever text: a layer named <script> is shown, not run.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// A labelled choice; `options` are [value, text].
export function choice(label, options, value, change, extra = {}) {
  const select = el('select', { 'aria-label': label, onchange: () => change(select.value), ...extra },
    ...options.map(([v, text]) => el('option', { value: v, selected: v === value }, text)));
  return el('label', { class: 'field' }, el('span', { 'aria-hidden': 'true' }, label), select);
}

export function once(wait, work) {
  let timer = 0;
  return (...args) => { clearTimeout(timer); timer = setTimeout(() => work(...args), wait); };
}
