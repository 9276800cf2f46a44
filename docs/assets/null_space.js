// An update's effect on activations to keep and to forget, in a plane: U is the horizontal line.
(() => {
  const host = document.getElementById("null-space");
  if (!host) return;
  host.innerHTML = `
    <style>
      #null-space { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1rem 0; }
      #null-space svg { width: 340px; max-width: 100%; }
      #null-space label { display: block; margin: .4rem 0; }
      #null-space input[type=range] { width: 220px; }
      #null-space meter { width: 220px; height: 1rem; display: block; }
    </style>
    <svg viewBox="-170 -130 340 260" role="img" aria-label="activations in a plane"></svg>
    <form>
      <label>angle of the forgotten one to U <input type="range" name="angle" min="5" max="90" value="35"></label>
      <label>spread of what is kept across U <input type="range" name="spread" min="0" max="60" value="12"></label>
      <label><input type="checkbox" name="project" checked> project the update: A (I − U Uᵀ)</label>
      <p>editability <output name="open"></output></p>
      <label>forgotten output moves <meter name="forget" max="1"></meter></label>
      <label>kept outputs move <meter name="keep" max="1"></meter></label>
      <p><output name="ratio"></output></p>
    </form>`;
  const form = host.querySelector("form");
  const svg = host.querySelector("svg");
  const shown = {};
  for (const item of form.querySelectorAll("output, meter")) shown[item.getAttribute("name")] = item;
  // Fixed draws, so that moving a slider moves the points and does not deal new ones.
  const points = Array.from({ length: 60 }, (_, i) => {
    const a = Math.sin(i * 12.9898) * 43758.5453;
    const b = Math.sin(i * 78.233) * 12543.2371;
    return [2 * (a - Math.floor(a)) - 1, 2 * (b - Math.floor(b)) - 1];
  });
  const line = (x, y, colour, width) =>
    `<line x1="0" y1="0" x2="${x}" y2="${-y}" stroke="${colour}" stroke-width="${width}"/>
     <circle cx="${x}" cy="${-y}" r="4" fill="${colour}"/>`;

  function draw() {
    const angle = (form.angle.value * Math.PI) / 180;
    const forget = [Math.cos(angle), Math.sin(angle)];
    const keep = points.map(([u, v]) => [u, (v * form.spread.value) / 100]);
    // Of length one, as the optimizer's steps have a length of their own.
    const a = form.project.checked ? [0, 1] : forget;
    const moved = ([x, y]) => Math.abs(a[0] * x + a[1] * y);
    const forgotten = moved(forget);
    const kept = Math.sqrt(keep.reduce((sum, x) => sum + moved(x) ** 2, 0) / keep.length);
    svg.innerHTML =
      `<line x1="-165" y1="0" x2="165" y2="0" stroke="currentColor" stroke-dasharray="4 4"/>
       <text x="150" y="-8" fill="currentColor">U</text>` +
      keep.map(([x, y]) => `<circle cx="${120 * x}" cy="${-120 * y}" r="3" fill="#3b7dd8"/>`).join("") +
      line(120 * forget[0], 120 * forget[1], "#d8483b", 3) +
      line(75 * a[0], 75 * a[1], "#2e9e5b", 2) +
      `<text x="${80 * a[0] - 8}" y="${-80 * a[1] - 8}" fill="#2e9e5b">A</text>`;
    shown.open.value = `${(100 * forget[1] ** 2).toFixed(0)} %`;
    shown.forget.value = forgotten;
    shown.keep.value = kept;
    shown.ratio.value = `For each unit of forgetting the kept outputs move by ${(kept / forgotten).toFixed(2)}.`;
  }
  form.addEventListener("input", draw);
  draw();
})();
