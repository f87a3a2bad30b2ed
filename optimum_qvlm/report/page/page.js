"use strict";
(() => {
  const root = document.documentElement;
  const hint = document.createElement("div");
  hint.className = "hint";
  hint.hidden = true;
  document.body.append(hint);

  // The title of a mark becomes its accessible name; shown at once, and on touch screens too.
  for (const mark of document.querySelectorAll(".mark")) {
    const title = mark.querySelector("title");
    if (title) {
      mark.setAttribute("aria-label", title.textContent);
      title.remove();
    }
  }
  const show = (event) => {
    const mark = event.target instanceof Element && event.target.closest(".mark");
    hint.hidden = !mark;
    if (!mark) return;
    hint.textContent = mark.getAttribute("aria-label");
    const left = Math.min(event.pageX + 14, window.scrollX + root.clientWidth - hint.offsetWidth - 8);
    hint.style.setProperty("left", `${Math.max(left, 8)}px`);
    const below = event.pageY + 18;
    const above = event.pageY - hint.offsetHeight - 12;
    hint.style.setProperty("top", `${below + hint.offsetHeight > window.scrollY + root.clientHeight ? above : below}px`);
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);
  // A finger leaves when it is lifted, and the number shall stay to be read.
  root.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hint.hidden = true; });

  const toggle = document.getElementById("theme");
  if (toggle) {
    toggle.hidden = false;
    toggle.addEventListener("click", () => {
      const dark = root.dataset.theme
        ? root.dataset.theme === "dark"
        : window.matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
    });
  }

  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  window.addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
})();
