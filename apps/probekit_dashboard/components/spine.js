// The text as tokens, over timelines of the same tokens. `probekitStrip` stands above this in the same module.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".pk-spine");
  root.probekitSelect = (i) => setTriggerValue("token", i);
  root.probekitPick = (k) => setTriggerValue("by", data.strip.quantities[k].label);
  const content = JSON.stringify([data.strip, data.picked, data.look, data.lines]);
  if (root.probekitContent === content) {
    for (const part of root.probekitParts) part.select(data.selected);
  } else {
    draw(root, data, root.contains(parentElement.activeElement ?? document.activeElement));
    root.probekitContent = content;
  }
  const body = root.querySelector(".pk-strip-body");
  const chosen = body.querySelector("[data-selected]");
  if (chosen) {
    const above = chosen.offsetTop - body.offsetTop - body.scrollTop;
    if (above < 0 || above > body.clientHeight - 24) body.scrollTop += above - body.clientHeight / 2;
  }
}

// Strip and timelines from nothing; where only another token is selected, what stands is kept.
function draw(root, data, focused) {
  const scrolled = root.querySelector(".pk-strip-body")?.scrollTop;
  const strip = document.createElement("div");
  const lines = document.createElement("div");
  lines.className = "pk-lines";
  root.replaceChildren(strip, lines);
  for (const [name, value] of Object.entries(data.look)) root.style.setProperty(name, value);
  const made = probekitStrip(strip, data.strip, {
    selected: data.selected,
    picked: data.picked,
    onSelect: (i) => root.probekitSelect(i),
    onPick: (k) => root.probekitPick(k),
  });
  const drawn = data.lines.map((line) => timeline(line, data, (i) => root.probekitSelect(i)));
  lines.append(...drawn.map((one) => one.box));
  root.probekitParts = [made, ...drawn];
  if (scrolled !== undefined) strip.querySelector(".pk-strip-body").scrollTop = scrolled;
  if (focused) strip.querySelector("[data-selected]")?.focus({ preventScroll: true });
}

const NS = "http://www.w3.org/2000/svg";

function node(tag, attributes) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// One small chart: a bar per token, clickable, the selected one marked.
function timeline(line, data, select) {
  const box = document.createElement("div");
  box.className = "pk-line";
  const label = document.createElement("div");
  label.className = "pk-line-label";
  const said = document.createElement("span");
  const name = document.createElement("span");
  name.textContent = `${line.label} (${line.unit})`;
  label.append(name, said);
  const n = line.values.length;
  const top = Math.max(...line.values.map((v) => v ?? 0), 1e-9);
  const svg = node("svg", { viewBox: `0 0 ${n} 100`, preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", `${line.label} of each token, at most ${top.toPrecision(3)} ${line.unit}`);
  let path = "";
  line.values.forEach((v, i) => {
    if (v !== null) path += `M${i + 0.06} 100V${(100 - (100 * v) / top).toFixed(2)}h0.88V100z`;
  });
  svg.append(node("path", { d: path, class: "pk-line-bars" }));
  const mark = node("rect", { x: data.selected, y: 0, width: 1, height: 100, class: "pk-line-mark" });
  const hover = node("rect", { x: 0, y: 0, width: 1, height: 100, class: "pk-line-hover", visibility: "hidden" });
  svg.append(mark, hover);
  const at = (event) => {
    const frame = svg.getBoundingClientRect();
    return Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - frame.left) / frame.width) * n)));
  };
  const show = (i) => {
    const value = line.values[i];
    said.textContent = `${i}: ${data.strip.tokens[i].slice(0, 24)}  ${value === null ? "undefined" : value.toPrecision(3)}`;
  };
  let selected = data.selected;
  show(selected);
  svg.addEventListener("mousemove", (event) => {
    hover.setAttribute("x", at(event));
    hover.setAttribute("visibility", "visible");
    show(at(event));
  });
  svg.addEventListener("mouseleave", () => {
    hover.setAttribute("visibility", "hidden");
    show(selected);
  });
  svg.addEventListener("click", (event) => select(at(event)));
  box.append(label, svg);
  return {
    box,
    select(i) {
      selected = i;
      mark.setAttribute("x", i);
      show(i);
    },
  };
}
