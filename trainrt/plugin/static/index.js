// TensorBoard imports this module into an empty frame and calls render().
import { remote } from './source.js';
import { mount } from './page.js';

export async function render() {
  const style = document.createElement('link');
  style.rel = 'stylesheet';
  style.href = './style.css';
  const loaded = new Promise((done) => { style.onload = style.onerror = done; });
  document.head.append(style);
  document.documentElement.lang = 'en';
  document.title = 'Training';
  await loaded;
  mount(document.body, remote('./api/'));
}
