// What the theme leaves out for screen readers and for the keyboard.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
addEventListener("load", () => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    table.tabIndex = 0; // a wide table is scrolled with the arrow keys
    table.setAttribute("role", "region");
    table.setAttribute("aria-label", "Table");
  }
});
