// Draws figures and token strips when they come into view, and all of them before the page is printed.
(() => {
  "use strict";
  const options = JSON.parse(document.getElementById("plot-options").textContent);
  const waiting = new Set(document.querySelectorAll("[data-drawing]"));

  function draw(place) {
    if (!waiting.delete(place)) return;
    const data = JSON.parse(document.getElementById(place.dataset.drawing).textContent);
    if (place.dataset.kind === "strip") probekitStrip(place, data);
    else Plotly.newPlot(place, data.data, data.layout, options);
    place.dataset.drawn = "";
  }

  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        observer.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "300px 0px" },
  );
  waiting.forEach((place) => observer.observe(place));

  window.addEventListener("beforeprint", () => {
    [...waiting].forEach(draw);
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    document.querySelectorAll(".chart").forEach((chart) => Plotly.Plots.resize(chart));
  });
})();
