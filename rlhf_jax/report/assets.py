"""The report's stylesheet and script: written into the page, so that it needs nothing else."""

from rlhf_jax.report.canvas import PALETTE

DARK = {
    "ink": "#e6edf3",
    "muted": "#8d96a0",
    "grid": "#30363d",
    "before": "#8b949e",
    "after": "#58a6ff",
    "score": "#bc8cff",
    "gold": "#e0a93b",
    "kl": "#39c5b4",
}


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in palette.items())


STYLE = (
    f":root {{ color-scheme: light dark; --page: #ffffff; --raised: #f6f8fa; {_variables(PALETTE)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ --page: #0d1117; --raised: #161b22; {_variables(DARK)} }} }}\n"
    """
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main, header, nav, footer { max-width: 1440px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 2px; padding-top: 14px; border-top: 1px solid var(--grid); }
h2 { overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 4px 0; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
a { color: var(--after); }
footer { padding-top: 32px; padding-bottom: 32px; }
nav { padding-top: 10px; display: flex; flex-wrap: wrap; gap: 2px 18px; }
.muted { color: var(--muted); }
.notice { border-left: 3px solid var(--gold); padding: 4px 12px; margin: 12px 0; background: var(--raised); }
.grid { display: grid; gap: 18px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 14px 24px; }
figure { margin: 0; max-width: 560px; }
.small figure { max-width: 350px; }
figure.tall { grid-row: span 2; }
figure > b { display: block; font-weight: 600; overflow-wrap: anywhere; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.4; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; }
.headline { margin: 8px 0; }
.headline td, .headline th { padding: 4px 20px 4px 0; border-bottom: 1px solid var(--grid); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: 14px 0; }
pre { background: var(--raised); padding: 12px; overflow: auto; max-height: 60vh; font-size: 12.5px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin: 6px 0; }
.controls input { font: inherit; padding: 5px 10px; min-width: min(100%, 300px); color: inherit;
  background: var(--page); border: 1px solid var(--muted); border-radius: 6px; }
.scroll { max-height: 75vh; overflow: auto; border: 1px solid var(--grid); border-radius: 6px; }
.samples { width: 100%; font-size: 13.5px; line-height: 1.4; }
.samples td, .samples th { padding: 6px 8px; vertical-align: top; border-bottom: 1px solid var(--grid); }
.samples thead th { position: sticky; top: 0; background: var(--raised); z-index: 1; }
.samples th.number { white-space: normal; }
.samples .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; min-width: 150px; }
.samples .completion { min-width: 240px; }
.samples button { all: unset; cursor: pointer; font-weight: 600; color: inherit; }
.samples button:focus-visible { outline: 2px solid var(--after); }
.samples th[aria-sort=ascending] button::after { content: " \\2191"; }
.samples th[aria-sort=descending] button::after { content: " \\2193"; }
.samples .was { color: var(--muted); }
.samples .after { color: var(--after); }
@media (max-width: 760px) {
  main, header, nav, footer { padding-left: 14px; padding-right: 14px; }
  .headline { display: block; overflow-x: auto; }
  .headline td, .headline th { padding-right: 10px; }
  .samples, .samples tbody, .samples tr { display: block; }
  .samples thead { display: block; }
  .samples thead tr { display: flex; flex-wrap: wrap; background: var(--raised); }
  .samples thead th { position: static; border: 0; padding: 4px 8px; }
  .samples tbody tr { padding: 8px 0; border-bottom: 2px solid var(--grid); }
  .samples tbody td { display: block; border: 0; padding: 2px 10px; text-align: left; }
  .samples tbody td.number { display: inline-block; }
  .samples tbody td::before { content: attr(data-label) " "; color: var(--muted); font-size: 12px; }
}
@media print { .scroll { max-height: none; overflow: visible; } .controls, nav { display: none; } }
"""
)

# Rows are moved and hidden, never rebuilt: nothing a sample says is read as markup.
SCRIPT = """
for (const section of document.querySelectorAll(".table")) {
  const body = section.querySelector("tbody"), rows = [...body.rows];
  const heads = [...section.querySelectorAll("thead th")];
  const filter = section.querySelector("input"), shown = section.querySelector(".shown");
  const textOf = row => [...row.querySelectorAll(".text")].map(cell => cell.textContent).join("\\n").toLowerCase();
  const texts = rows.map(textOf);
  const select = () => {
    const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every(word => texts[i].includes(word));
      count += !row.hidden;
    });
    shown.textContent = `${count} of ${rows.length} prompts`;
  };
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell.classList.contains("number")) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    // Numbers start with the greatest, texts with the first.
    const numeric = head.classList.contains("number"), sorted = head.getAttribute("aria-sort");
    const descending = sorted ? sorted === "ascending" : numeric;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const keyed = rows.map(row => [key(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = numeric ? a - b : a.localeCompare(b);
      return descending ? -order : order;
    });
    body.append(...keyed.map(([, row]) => row));
  }));
  filter.addEventListener("input", select);
  section.querySelector(".controls").hidden = false;
  select();
}
"""
