// Follows the system's light or dark mode until the user clicks the button. Runs before the page is drawn.
"use strict";
(() => {
  const root = document.documentElement;
  const chosen = localStorage.getItem("rlaif:theme");
  if (chosen) root.dataset.theme = chosen;
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      localStorage.setItem("rlaif:theme", root.dataset.theme);
    });
  });
})();
