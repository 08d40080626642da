// A heat map whose cells can be clicked, and reached by keyboard. Labels are untrusted: canvas text and textContent only.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".pk-grid");
  const focused = root.contains(parentElement.activeElement ?? document.activeElement);
  for (const [name, value] of Object.entries(data.look)) root.style.setProperty(name, value);
  const made = (tag, className) => Object.assign(document.createElement(tag), { className });
  const canvas = made("canvas", "pk-grid-canvas");
  const frame = made("div", "pk-grid-frame");
  const tip = made("div", "pk-grid-tip");
  const legend = made("div", "pk-grid-legend");
  tip.hidden = true;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "grid");
  canvas.setAttribute("aria-label", data.alt);
  frame.append(canvas, tip);
  root.replaceChildren(legend, frame);

  const rows = data.rows.length;
  const columns = data.columns.length;
  const left = 46;
  const bottom = data.tall ? 78 : 24;
  let width = 0;
  let cursor = data.selected ? [...data.selected] : [0, 0];
  const height = () => Math.max(data.least ?? 14, Math.min(data.cell ?? 17, 560 / rows)) * rows;
  const cellWidth = () => (width - left) / columns;
  const yOf = (row) => height() - ((row + 1) * height()) / rows; // row 0 at the bottom

  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const stops = data.colors.map(channels);
  const scaled = data.scale === "log" ? (v) => Math.log(Math.max(v, data.low)) : (v) => v;
  function color(value) {
    if (value === null) return channels(data.undefined);
    const span = scaled(data.high) - scaled(data.low);
    const share = span > 0 ? Math.min(1, Math.max(0, (scaled(value) - scaled(data.low)) / span)) : 0.5;
    const at = share * (stops.length - 1);
    const below = Math.min(Math.floor(at), stops.length - 2);
    return stops[below].map((c, i) => Math.round(c + (stops[below + 1][i] - c) * (at - below)));
  }
  const light = (rgb) => {
    const linear = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.22;
  };
  const number = (v) => (v === null ? "undefined" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(Number(v.toPrecision(4))));

  function draw() {
    width = frame.clientWidth;
    if (!width) return;
    const ratio = window.devicePixelRatio || 1;
    const whole = height() + bottom;
    canvas.style.height = `${whole}px`;
    canvas.width = width * ratio;
    canvas.height = whole * ratio;
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(root);
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, whole);
    const w = cellWidth();
    const h = height() / rows;
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) {
        const rgb = color(data.values[r * columns + c]);
        pen.fillStyle = `rgb(${rgb})`;
        pen.fillRect(left + c * w, yOf(r), Math.ceil(w * ratio) / ratio, Math.ceil(h * ratio) / ratio);
        if (data.words && w > 30 && h > 11) {
          pen.fillStyle = light(rgb) ? "#20262e" : "#ffffff";
          pen.font = `${Math.min(11, h - 3)}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace`;
          pen.textBaseline = "middle";
          pen.save();
          pen.beginPath();
          pen.rect(left + c * w + 1, yOf(r), w - 2, h);
          pen.clip();
          pen.fillText(data.words[r * columns + c] ?? "", left + c * w + 3, yOf(r) + h / 2);
          pen.restore();
        }
      }
    }
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.font = '11px Inter, "Helvetica Neue", Arial, "Liberation Sans", sans-serif';
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(13 / h);
    for (let r = 0; r < rows; r += every) pen.fillText(data.rows[r], left - 6, yOf(r) + h / 2);
    const step = Math.ceil((data.tall ? 12 : 30) / w);
    for (let c = 0; c < columns; c += step) {
      pen.save();
      pen.translate(left + (c + 0.5) * w, height() + 6);
      if (data.tall) {
        pen.rotate(-Math.PI / 3);
        pen.textAlign = "right";
        pen.fillText(data.columns[c].slice(0, 12), 0, 4);
      } else {
        pen.textAlign = "center";
        pen.fillText(data.columns[c].slice(0, 12), 0, 6);
      }
      pen.restore();
    }
    const mark = (place, colour, wide) => {
      pen.strokeStyle = colour;
      pen.lineWidth = wide;
      pen.strokeRect(left + place[1] * w, yOf(place[0]), w, h);
    };
    if (data.selected) {
      if (data.cross) {
        // Outlines, not a tint: the colours stay what they mean.
        pen.strokeStyle = "rgba(208, 88, 11, 0.75)";
        pen.lineWidth = 1;
        pen.strokeRect(left + data.selected[1] * w, 0, w, height());
        pen.strokeRect(left, yOf(data.selected[0]), width - left, h);
      }
      mark(data.selected, "#d0580b", 2.5);
    }
    if (canvas === (parentElement.activeElement ?? document.activeElement)) mark(cursor, style.getPropertyValue("--ink"), 1.5);
  }

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - left) / cellWidth());
    const r = rows - 1 - Math.floor(((event.clientY - box.top) / height()) * rows);
    return c >= 0 && c < columns && r >= 0 && r < rows ? [r, c] : null;
  };
  function show([r, c]) {
    const lines = [`${data.row_name} ${data.row_hover ? data.row_hover[r] : data.rows[r]} · ${data.column_name} ${data.hover ? data.hover[c] : data.columns[c]}`];
    lines.push(`${data.quantity}: ${number(data.values[r * columns + c])}${data.unit ? " " + data.unit : ""}`);
    if (data.words) lines.push(data.words[r * columns + c] ?? "");
    tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
    tip.hidden = false;
    const x = left + (c + 1) * cellWidth() + 6;
    tip.style.left = `${Math.max(0, x + tip.offsetWidth > width ? left + c * cellWidth() - tip.offsetWidth - 6 : x)}px`;
    tip.style.top = `${Math.max(0, yOf(r) - 8)}px`;
  }
  canvas.addEventListener("mousemove", (event) => (place(event) ? show(place(event)) : (tip.hidden = true)));
  canvas.addEventListener("mouseleave", () => (tip.hidden = true));
  canvas.addEventListener("click", (event) => place(event) && setTriggerValue("cell", place(event)));
  canvas.addEventListener("focus", draw);
  canvas.addEventListener("blur", () => ((tip.hidden = true), draw()));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (event.key === "Enter" || event.key === " ") setTriggerValue("cell", cursor);
    else if (!step) return;
    else cursor = [Math.min(rows - 1, Math.max(0, cursor[0] + step[0])), Math.min(columns - 1, Math.max(0, cursor[1] + step[1]))];
    event.preventDefault();
    draw();
    show(cursor);
  });

  const ramp = made("span", "pk-grid-ramp");
  ramp.style.background = `linear-gradient(to right, ${data.colors.join(",")})`;
  const word = (text) => Object.assign(document.createElement("span"), { textContent: text });
  const unit = [data.unit, data.scale === "log" ? "log scale" : ""].filter(Boolean).join(", ");
  legend.append(word(data.quantity), word(number(data.low)), ramp, word(number(data.high)), word(unit));
  const watch = new ResizeObserver(draw);
  watch.observe(frame);
  draw();
  if (focused) canvas.focus({ preventScroll: true });
  return () => watch.disconnect();
}
