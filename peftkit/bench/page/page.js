"use strict";

// Sorting: a button in each header; numbers by their exact value, what was not measured always last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead button").forEach((button) => {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const descending = header.getAttribute("aria-sort") === "none" ? header.dataset.first === "descending" : header.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[header.cellIndex].dataset.sort;
      const numeric = header.dataset.kind === "number";
      const rows = [...body.rows].map((row, place) => ({ row, place, key: key(row) }));
      rows.sort((a, b) => {
        if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "") || a.place - b.place;
        const order = numeric ? Number(a.key) - Number(b.key) : a.key.localeCompare(b.key);
        return (descending ? -order : order) || a.place - b.place;
      });
      body.append(...rows.map((each) => each.row));
    });
  });
}

// Light, dark, or as the system says.
const themes = ["auto", "light", "dark"];
const toggle = document.getElementById("theme");
toggle.hidden = false;
toggle.addEventListener("click", () => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % themes.length];
  document.documentElement.dataset.theme = next;
  toggle.textContent = `Colours: ${next}`;
});

// Examples that one method gets right and another wrong. Texts go into the page as text, never as HTML.
const chooser = document.getElementById("examples");
if (chooser) {
  const data = JSON.parse(document.getElementById("answers").textContent);
  const [task, better, worse] = ["task", "better", "worse"].map((name) => document.getElementById(`choose-${name}`));
  const list = document.getElementById("example-list");
  const told = document.getElementById("example-count");
  const SHOWN = 30;

  const element = (tag, text, parent) => {
    const made = document.createElement(tag);
    made.textContent = text;
    parent.append(made);
    return made;
  };

  const show = () => {
    const { texts, methods } = data[task.value];
    const [a, b] = [methods[better.value], methods[worse.value]];
    list.replaceChildren();
    if (!a || !b) {
      told.textContent = "One of them has no finished seed on this task.";
      return;
    }
    if (a.examples !== b.examples) {
      told.textContent = "They did not answer the same examples.";
      return;
    }
    const share = (method, i) => method.right[i] / method.seeds;
    const found = a.right.map((_, i) => i).filter((i) => share(a, i) > share(b, i));
    found.sort((i, j) => share(a, j) - share(b, j) - (share(a, i) - share(b, i)) || i - j);
    const other = b.right.filter((_, i) => share(b, i) > share(a, i)).length;
    const cut = found.length > SHOWN ? `, the ${SHOWN} clearest shown` : "";
    told.textContent = `${better.value} is right more often than ${worse.value} on ${found.length} of ${a.right.length} examples${cut}; less often on ${other}.`;
    for (const i of found.slice(0, SHOWN)) {
      const card = element("article", "", list);
      card.className = "example";
      element("strong", `Example ${i + 1}`, card);
      const facts = element("dl", "", card);
      const fact = (name, text) => {
        element("dt", name, facts);
        element("dd", text, facts);
      };
      if (texts[i]) {
        fact("prompt", texts[i].prompt || "(not kept)");
        fact("reference", texts[i].answer);
      }
      for (const [name, method] of [[better.value, a], [worse.value, b]]) {
        const wrong = method.wrong[i] === undefined ? "" : `\nwrong answer: ${method.wrong[i] || "(empty)"}`;
        fact(name, `right in ${method.right[i]} of ${method.seeds} seeds${wrong}`);
      }
    }
  };
  for (const each of [task, better, worse]) each.addEventListener("change", show);
  chooser.hidden = false;
  show();
}
