"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");

  const show = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
  };
  show(system.matches);
  system.addEventListener("change", (event) => show(event.matches));
  button.addEventListener("click", () => show(root.dataset.theme !== "dark"));

  const options = {
    renderer: "svg",
    config: JSON.parse(document.querySelector("[data-config]").textContent),
    actions: { export: true, source: false, compiled: false, editor: false },
  };

  const draw = async (chart) => {
    if (chart.dataset.drawn) return;
    chart.dataset.drawn = "begun";
    const spec = JSON.parse(document.querySelector(`[data-spec="${chart.dataset.figure}"]`).textContent);
    const columns = Math.max(1, Math.floor(chart.clientWidth / 170));
    const config = structuredClone(options.config);
    config.legend.columns = columns;
    config.background = "transparent";
    await vegaEmbed(chart, spec, { ...options, config });
    const { title, text } = chart.dataset;
    const svg = chart.querySelector("svg.marks"), save = chart.querySelector("summary");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${title}. ${text}`);
    save.setAttribute("aria-label", `Save the figure: ${title}`);
    chart.dataset.drawn = "done";
  };

  // a figure is drawn when it comes near the window, so that a page of many runs opens at once
  const near = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => { near.unobserve(e.target); draw(e.target); }),
    { rootMargin: "400px" },
  );
  const charts = [...document.querySelectorAll(".chart")];
  charts.forEach((chart) => near.observe(chart));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details.run").forEach((run) => { run.open = true; });
    charts.forEach(draw);
  });

  // a link to a run opens it
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.matches("details")) target.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
