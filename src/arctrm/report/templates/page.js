"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const store = (value) => {
    try { return value ? localStorage.setItem("arctrm-theme", value) : localStorage.getItem("arctrm-theme"); }
    catch { return null; }
  };

  // Light and dark: the system's choice until the switch is used.
  const paint = (theme) => { root.dataset.theme = theme; };
  if (store()) paint(store());
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const flip = () => { paint(isDark() ? "light" : "dark"); store(root.dataset.theme); };
  all("#theme").forEach((button) => button.addEventListener("click", flip));

  // TRM's refinement: a slider over supervision steps.
  all(".refined").forEach((box) => {
    const slider = box.querySelector("input"), play = box.querySelector("button");
    const steps = all("figure", box);
    let timer = 0;
    const show = () => {
      steps.forEach((step, i) => step.classList.toggle("now", i === Number(slider.value)));
      slider.setAttribute("aria-valuetext", steps[slider.value].textContent.trim());
    };
    const stop = () => { clearInterval(timer); timer = 0; play.textContent = "play"; };
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      slider.value = 0; show(); play.textContent = "stop";
      timer = setInterval(() => { slider.value = Number(slider.value) + 1; show(); if (slider.value === slider.max) stop(); }, 700);
    });
    box.classList.add("slides");
    show();
  });

  // A broken invariant shows the cells that break it.
  all("button[data-mark]").forEach((button) => button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true", row = button.closest(".candidate");
    all("button[data-mark]", row).forEach((other) => other.setAttribute("aria-pressed", on && other === button));
    all(".mark", row).forEach((mark) => mark.classList.toggle("shown", on && mark.dataset.name === button.dataset.mark));
  }));

  // What is folded is packed until it is opened, so that hundreds of tasks open at once.
  all("details").forEach((more) => more.addEventListener("toggle", async () => {
    const packed = more.querySelector("script");
    const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    packed.outerHTML = await new Response(stream).text();
  }, { once: true }));

  // The gallery: filters that a link can carry, search, next and last task.
  const cards = all(".card"), search = document.querySelector("#search"), chips = all("button[data-filter]");
  const chosen = new URLSearchParams(location.hash.slice(1));
  const filter = () => {
    const text = (chosen.get("search") || "").toLowerCase();
    let count = 0;
    cards.forEach((card) => {
      const fits = ["status", "voice"].every((key) => !chosen.get(key) || chosen.get(key) === card.dataset[key]);
      card.hidden = !(fits && card.id.toLowerCase().includes(text));
      count += !card.hidden;
    });
    chips.forEach((chip) => chip.setAttribute("aria-pressed", (chosen.get(chip.dataset.filter) || "") === chip.value));
    all("#count").forEach((place) => { place.textContent = `${count} of ${cards.length} tasks`; });
  };
  const choose = (key, value) => {
    value ? chosen.set(key, value) : chosen.delete(key);
    try { history.replaceState(null, "", `#${chosen}`); } catch { /* a page without an address */ }
    filter();
  };
  chips.forEach((chip) => chip.addEventListener("click", () => choose(chip.dataset.filter, chip.value)));
  if (search) {
    search.value = chosen.get("search") || "";
    search.addEventListener("input", () => choose("search", search.value.trim()));
    filter();
  }
  const go = (step) => {
    const shown = cards.filter((card) => !card.hidden), here = shown.indexOf(document.activeElement.closest(".card"));
    const next = shown[Math.max(0, Math.min(shown.length - 1, here + step))];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input[type=search]")) { if (event.key === "Escape") event.target.blur(); return; }
    if (event.key === "t") flip();
    else if (event.key === "j") go(1);
    else if (event.key === "k") go(-1);
    else if (event.key === "/" && search) { event.preventDefault(); search.focus(); }
    else if (event.key === "Enter" && event.target.matches(".card")) { const more = event.target.querySelector("details"); if (more) more.open = !more.open; }
  });
})();
