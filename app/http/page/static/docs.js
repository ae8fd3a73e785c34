// Starts Swagger UI on the document of this server. It asks no other host: no validator's badge, no link to one.

const dark = matchMedia('(prefers-color-scheme: dark)');
const follow = () => document.documentElement.classList.toggle('dark-mode', dark.matches);
dark.addEventListener('change', follow);
follow();

const folder = new URL('.', location).href.replace(/\/$/, '');

const response = await fetch('openapi.json');
const found = await response.json();
if (response.ok) {
  document.title = `${found.info.title} ${found.info.version}`;
  // Under a sub-path, "Try it out" has to keep it.
  globalThis.SwaggerUIBundle({
    dom_id: '#documentation',
    spec: { ...found, servers: [{ url: folder }] },
    deepLinking: true,
    validatorUrl: null,
    tryItOutEnabled: true,
    displayRequestDuration: true,
  });
} else {
  // Before the model has passed its checks, nobody knows which routes there are.
  document.getElementById('documentation').textContent = `No documentation yet: ${found.error}`;
}
