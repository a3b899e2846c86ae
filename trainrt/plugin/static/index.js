// TensorBoard imports this module into an empty frame and calls render().
//
// Nothing waits for what it does not need: the modules, the style and the first answer, which holds the list of runs,
// the run and its first picture, are all asked for before any of them is there.

const MODULES = ['axis', 'chart', 'comparison', 'data', 'dom', 'drill', 'heatmap', 'legend', 'map', 'numbers', 'page',
  'pairs', 'passport', 'place', 'scale', 'source', 'theme', 'verdict', 'wire'];
const API = './api/'; // from the frame's base, with the prefix or the proxy that TensorBoard is behind

const link = (rel, name) => {
  const node = document.createElement('link');
  node.rel = rel;
  node.href = new URL(name, import.meta.url).href;
  document.head.append(node);
  return node;
};
const answer = fetch(`${API}first?${wanted()}`).then((response) => (response.ok ? response.arrayBuffer() : null)).catch(() => null);
for (const name of MODULES) link('modulepreload', `${name}.js`);
const style = link('stylesheet', 'style.css');
const styled = new Promise((done) => { style.onload = style.onerror = done; });

// What the address asks for, and about as many columns as the page will have room for.
function wanted() {
  let hash = '';
  try { hash = window.parent.location.hash; } catch { /* a frame of another origin */ }
  const given = new URLSearchParams(hash.replace(/^#[^&]*&?/, '')), query = new URLSearchParams();
  for (const name of ['run', 'group', 'statistic', 'first', 'last']) {
    const value = given.get(name) ?? given.get(`p.trainrt.${name}`);
    if (value && (!/^(first|last)$/.test(name) || /^\d{1,15}$/.test(value))) query.set(name, value);
  }
  const width = Math.min(window.innerWidth, 1240) - (window.innerWidth > 660 ? 42 : 26);
  if (width > 0) query.set('columns', Math.max(100, Math.min(1000, Math.round((width - 120) / 2))));
  return query;
}

export async function render() {
  document.documentElement.lang = 'en';
  document.title = 'Training';
  const [{ remote }, { mount }] = await Promise.all([import('./source.js'), import('./page.js'), styled]);
  mount(document.body, remote(API, answer));
}
