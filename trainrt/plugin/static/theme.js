// Light or dark: TensorBoard's own choice where there is one, else the system's.
function parentBody() {
  try {
    return window.parent !== window ? window.parent.document.body : null;
  } catch {
    return null;
  }
}

export function watchTheme(changed) {
  const system = matchMedia('(prefers-color-scheme: dark)');
  const body = parentBody();
  const apply = () => {
    const dark = body ? body.classList.contains('dark-mode') : system.matches;
    const theme = dark ? 'dark' : 'light';
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    changed(theme);
  };
  apply();
  if (body) new MutationObserver(apply).observe(body, { attributes: true, attributeFilter: ['class'] });
  else system.addEventListener('change', apply);
}

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const isDark = () => document.documentElement.dataset.theme === 'dark';
