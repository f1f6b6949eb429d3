"use strict";
// The theme follows the system until the button is pressed.
(() => {
  const button = document.getElementById("theme"), sheet = document.getElementById("dark"), system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("mstkd-theme"); } catch { /* a browser may forbid it to local files */ }
  const isDark = () => chosen ? chosen === "dark" : system.matches;
  const apply = () => {
    sheet.media = isDark() ? "screen" : "not all";
    button.textContent = isDark() ? "Light theme" : "Dark theme";
  };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    try { localStorage.setItem("mstkd-theme", chosen); } catch { /* it holds for this visit */ }
    apply();
  });
  system.addEventListener("change", apply);
  button.hidden = false;
  apply();
})();

// Panels under each other become tabs; on paper, and without scripts, they stay under each other.
for (const tabs of document.querySelectorAll(".tabs")) {
  const panels = [...tabs.children];
  if (panels.length < 2) continue;
  const list = document.createElement("div");
  list.className = "tablist";
  list.setAttribute("role", "tablist");
  const buttons = panels.map((panel, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = panel.dataset.title;
    button.setAttribute("role", "tab");
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-label", panel.dataset.title);
    button.addEventListener("click", () => show(number));
    list.append(button);
    return button;
  });
  const show = (chosen) => panels.forEach((panel, number) => {
    panel.hidden = number !== chosen;
    buttons[number].setAttribute("aria-selected", String(number === chosen));
    buttons[number].tabIndex = number === chosen ? 0 : -1;
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
    show(next);
    buttons[next].focus();
  });
  tabs.prepend(list);
  tabs.classList.add("live");
  show(0);
}

// The section that is read is marked in the navigation.
{
  const nav = document.querySelector("nav"), links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [name, link] of links) name === entry.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
      nav.scrollLeft = links.get(entry.target.id).offsetLeft - 60;
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) watcher.observe(section);
}

// What is folded is printed as well.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => { details.open = true; }));
