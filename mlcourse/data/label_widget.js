// Boxes by mouse: drag to draw, click a box to choose it, Delete to remove it, 1 to 9 for its class.
function render({ model, el }) {
  const canvas = document.createElement("canvas"), bar = document.createElement("div");
  const say = document.createElement("span"), image = new Image();
  const colours = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"];
  let kind = 0, chosen = -1, from = null, to = null, zoom = 1;
  canvas.tabIndex = 0; canvas.style.cssText = "cursor:crosshair;outline-offset:2px;display:block";
  const boxes = () => model.get("boxes").map(b => [...b]);
  const store = b => { model.set("boxes", b); model.save_changes(); draw(); };
  const button = (text, act) => {
    const b = document.createElement("button"); b.textContent = text; b.style.margin = "2px";
    b.onclick = act; bar.append(b); return b;
  };
  const go = step => {
    const n = model.get("number") + step;
    if (n < 0 || n >= model.get("count")) return;
    chosen = -1; model.set("number", n); model.save_changes();
  };
  button("\u25C0", () => go(-1)); button("\u25B6", () => go(1));
  const kinds = model.get("names").map((name, k) => button(name, () => pick(k)));
  bar.append(say);
  function pick(k) {
    if (k >= kinds.length) return;
    kind = k;
    if (chosen >= 0) { const b = boxes(); b[chosen][0] = k; store(b); }
    draw();
  }
  function draw() {
    const g = canvas.getContext("2d");
    g.drawImage(image, 0, 0, canvas.width, canvas.height);
    const line = (k, x0, y0, x1, y1, wide) => {
      g.strokeStyle = colours[k % colours.length]; g.lineWidth = wide ? 4 : 2;
      g.strokeRect(x0 * zoom, y0 * zoom, (x1 - x0) * zoom, (y1 - y0) * zoom);
      g.fillStyle = g.strokeStyle; g.font = "13px sans-serif";
      g.fillText(model.get("names")[k] || "", x0 * zoom + 2, Math.max(12, y0 * zoom - 4));
    };
    boxes().forEach(([k, ...b], i) => line(k, ...b, i === chosen));
    if (from && to) line(kind, ...from, ...to, false);
    kinds.forEach((b, k) => { b.style.borderColor = k === kind ? colours[k % colours.length] : ""; });
    say.textContent = ` picture ${model.get("number") + 1} of ${model.get("count")}, ${boxes().length} boxes`;
  }
  image.onload = () => {
    zoom = Math.max(1, Math.min(8, 480 / image.width)); if (image.width > 960) zoom = 960 / image.width;
    canvas.width = image.width * zoom; canvas.height = image.height * zoom; draw();
  };
  const at = e => {
    const r = canvas.getBoundingClientRect();
    return [(e.clientX - r.left) / zoom, (e.clientY - r.top) / zoom].map(
      (v, i) => Math.min(Math.max(v, 0), i ? image.height : image.width));
  };
  canvas.onpointerdown = e => { canvas.setPointerCapture(e.pointerId); canvas.focus(); from = at(e); to = from; };
  canvas.onpointermove = e => { if (from) { to = at(e); draw(); } };
  canvas.onpointerup = e => {
    if (!from) return;
    to = at(e);
    const b = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
    const [x, y] = to; from = to = null;
    if (b[2] - b[0] >= 2 && b[3] - b[1] >= 2) { const all = boxes(); all.push([kind, ...b]); chosen = all.length - 1; store(all); }
    else { chosen = boxes().findIndex(([, x0, y0, x1, y1]) => x0 <= x && x <= x1 && y0 <= y && y <= y1); draw(); }
  };
  canvas.onkeydown = e => {
    if ((e.key === "Delete" || e.key === "Backspace") && chosen >= 0) {
      const b = boxes(); b.splice(chosen, 1); chosen = -1; store(b); e.preventDefault();
    } else if (e.key >= "1" && e.key <= "9") pick(e.key - 1);
  };
  const load = () => { image.src = model.get("picture"); };
  model.on("change:picture", load); model.on("change:boxes", draw);
  el.append(bar, canvas); load();
}
export default { render };
