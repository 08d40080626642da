// Draws one token strip into `root`. Tokens are untrusted: they reach the page through textContent only.
// Options: `selected` (a token that is marked), `onSelect(i)` (a token was clicked, or Enter pressed on it), `picked`
// (the quantity that is shown first) and `onPick(k)`. Returns `select(i)`, which marks another token.
function probekitStrip(root, data, given) {
  "use strict";
  const options = given ?? {};
  const GLYPHS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
  let picked = 0;
  let current = options.selected ?? 0;

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function format(value) {
    if (value === null) return "undefined";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-4 || size >= 1e9) return value.toExponential(2);
    return Number(value.toPrecision(size >= 1000 ? 6 : 3)).toLocaleString("en", { maximumFractionDigits: size >= 1000 ? 0 : 7 });
  }

  function withUnit(value, unit) {
    return value === null || !unit ? format(value) : `${format(value)} ${unit}`;
  }

  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const ramps = {};
  for (const scale of ["sequential", "log", "diverging"]) ramps[scale] = data.colors[scale].map(channels);

  function share(value, quantity) {
    const scaled = quantity.scale === "log" ? (v) => Math.log(Math.max(v, quantity.low)) : (v) => v;
    const low = scaled(quantity.low);
    const width = scaled(quantity.high) - low;
    return width > 0 ? Math.min(1, Math.max(0, (scaled(value) - low) / width)) : 0.5;
  }

  function color(value, quantity) {
    if (value === null || quantity.low === null) return channels(data.colors.undefined);
    const stops = ramps[quantity.scale];
    const at = share(value, quantity) * (stops.length - 1);
    const below = Math.min(Math.floor(at), stops.length - 2);
    return stops[below].map((c, i) => Math.round(c + (stops[below + 1][i] - c) * (at - below)));
  }

  function ink(rgb) {
    const linear = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.22 ? "#20262e" : "#ffffff";
  }

  // Blanks stay what they are, so that copied text is the text; a faint glyph lies over them.
  function writeToken(node, text) {
    for (const part of text.split(/([ \n\t\r]+)/)) {
      if (!part) continue;
      if (!/[ \n\t\r]/.test(part)) {
        node.append(part);
        continue;
      }
      for (const run of part.match(/ +|[\n\t\r]/g)) {
        const blank = make("span", "pk-strip-blank", run[0] === " " ? run : " ");
        blank.dataset.glyph = GLYPHS[run[0]].repeat(run.length);
        node.append(blank);
      }
    }
  }

  const spans = data.tokens.map((token, i) => {
    const span = make("span", "pk-strip-token");
    span.dataset.i = i;
    span.tabIndex = i === (options.selected ?? 0) ? 0 : -1;
    if (i === options.selected) span.dataset.selected = "";
    writeToken(span, token);
    return span;
  });

  function buildBody() {
    const body = make("div", "pk-strip-body");
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", data.alt);
    const several = new Set(data.texts).size > 1;
    let paragraph = null;
    data.tokens.forEach((token, i) => {
      if (paragraph === null || data.texts[i] !== data.texts[i - 1]) {
        paragraph = body.appendChild(make("div", "pk-strip-text"));
        if (several) paragraph.append(make("span", "pk-strip-name", `text ${data.texts[i]}`));
      }
      paragraph.append(spans[i]);
      if (token.includes("\n")) paragraph.append(document.createElement("br"));
    });
    return body;
  }

  const choices = make("div", "pk-strip-choices");
  choices.setAttribute("role", "group");
  choices.setAttribute("aria-label", "Colour tokens by");
  const buttons = data.quantities.map((quantity, k) => {
    const button = choices.appendChild(make("button", "", quantity.label));
    button.type = "button";
    button.addEventListener("click", () => {
      pick(k);
      options.onPick?.(k);
    });
    return button;
  });
  const legend = make("div", "pk-strip-legend");
  const tip = make("div", "pk-strip-tip");
  tip.setAttribute("role", "status");
  tip.hidden = true;
  const body = buildBody();

  function drawLegend(quantity) {
    legend.replaceChildren();
    if (quantity.low !== null) {
      const ramp = make("span", "pk-strip-ramp");
      ramp.style.background = `linear-gradient(to right, ${data.colors[quantity.scale].join(",")})`;
      const known = quantity.values.filter((v) => v !== null);
      const below = known.some((v) => v < quantity.low) ? "≤ " : "";
      const above = known.some((v) => v > quantity.high) ? "≥ " : "";
      const unit = quantity.unit + (quantity.scale === "log" ? `${quantity.unit ? ", " : ""}log scale` : "");
      legend.append(make("span", "", below + format(quantity.low)), ramp, make("span", "", above + format(quantity.high)));
      if (unit) legend.append(make("span", "pk-strip-unit", unit));
    }
    if (quantity.values.includes(null)) {
      const gap = make("span", "pk-strip-gap");
      gap.style.background = data.colors.undefined;
      legend.append(gap, make("span", "", "undefined"));
    }
  }

  function pick(k) {
    picked = k;
    const quantity = data.quantities[k];
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === k)));
    spans.forEach((span, i) => {
      const rgb = color(quantity.values[i], quantity);
      span.style.backgroundColor = `rgb(${rgb.join(",")})`;
      span.style.color = ink(rgb);
    });
    drawLegend(quantity);
  }

  function fillTip(i) {
    const name = make("div", "pk-strip-tip-token");
    name.textContent = data.tokens[i].replace(/[ \n\t\r]/g, (c) => (c === " " ? "␣" : GLYPHS[c])) || "(empty)";
    tip.replaceChildren(name, make("div", "pk-strip-tip-place", `position ${data.positions[i]} · text ${data.texts[i]}`));
    data.quantities.forEach((quantity, k) => {
      const row = tip.appendChild(make("div", "pk-strip-tip-row"));
      if (k === picked) row.dataset.picked = "";
      row.append(make("span", "", quantity.label), make("span", "", withUnit(quantity.values[i], quantity.unit)));
    });
    if (data.notes.length && data.notes[i]) tip.append(make("div", "pk-strip-tip-note", data.notes[i]));
  }

  function showTip(span) {
    fillTip(Number(span.dataset.i));
    tip.hidden = false;
    const frame = root.getBoundingClientRect();
    const box = span.getBoundingClientRect();
    const left = Math.max(0, Math.min(box.left - frame.left, frame.width - tip.offsetWidth));
    const fits = box.bottom + tip.offsetHeight + 8 < window.innerHeight || box.top < tip.offsetHeight + 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${fits ? box.bottom - frame.top + 6 : box.top - frame.top - tip.offsetHeight - 6}px`;
  }

  const tokenOf = (event) => event.target.closest(".pk-strip-token");
  body.addEventListener("mouseover", (event) => (tokenOf(event) ? showTip(tokenOf(event)) : (tip.hidden = true)));
  body.addEventListener("mouseleave", () => (tip.hidden = true));
  body.addEventListener("focusin", (event) => tokenOf(event) && showTip(tokenOf(event)));
  body.addEventListener("focusout", () => (tip.hidden = true));
  body.addEventListener("scroll", () => (tip.hidden = true));
  body.addEventListener("click", (event) => {
    if (!tokenOf(event)) return;
    moveTo(Number(tokenOf(event).dataset.i));
    options.onSelect?.(current);
  });
  body.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") tip.hidden = true;
    if (options.onSelect && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      options.onSelect(current);
    }
    if (step === undefined) return;
    event.preventDefault();
    moveTo(Math.min(spans.length - 1, Math.max(0, current + step)));
  });

  function moveTo(i) {
    spans[current].tabIndex = -1;
    current = i;
    spans[i].tabIndex = 0;
    spans[i].focus();
  }

  const bar = make("div", "pk-strip-bar");
  bar.append(choices, legend);
  root.classList.add("pk-strip");
  root.replaceChildren(bar, body, tip);
  pick(options.picked ?? 0);
  let marked = options.selected;

  function select(i) {
    if (marked !== undefined) delete spans[marked].dataset.selected;
    spans[current].tabIndex = -1;
    marked = current = i;
    spans[i].dataset.selected = "";
    spans[i].tabIndex = 0;
  }
  return { select };
}
