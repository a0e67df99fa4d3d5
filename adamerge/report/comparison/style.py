"""The style and the script of the page of a comparison."""

STYLE = """
:root{--ink:#1c1c1c;--soft:#595959;--line:#d0d0d0;--page:#fff;--mark:#e8f1fb}
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--soft:#b4b4b4;--line:#444;--page:#16181c;--mark:#1d3550}}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:var(--page);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 0}
svg{width:100%;min-width:560px;max-width:860px;height:auto;font-size:12px}
svg text{fill:currentColor}.grid{stroke:var(--line);fill:none}.axis{stroke:currentColor;fill:none}
.front{stroke-dasharray:4 3}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}
caption{text-align:left;color:var(--soft);padding:4px 0}
th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left;white-space:normal;max-width:38vw;position:sticky;left:0;background:var(--page)}
thead button{font:inherit;font-weight:bold;color:inherit;background:none;border:0;
  padding:4px 0;cursor:pointer}
[aria-sort=ascending] button::after{content:" ▲"}[aria-sort=descending] button::after{content:" ▼"}
.best{background:var(--mark);font-weight:bold}
.baseline,.baseline th{color:var(--soft);font-weight:normal}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:2px 18px;font-size:13px}
.dot{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
figure{margin:8px 0}.map{width:100%;image-rendering:pixelated;border:1px solid var(--line)}
li{overflow-wrap:anywhere}
@media print{body{font-size:11px}section{break-inside:avoid}.wide{overflow:visible}}
"""

SCRIPT = """
document.querySelectorAll("table.sortable thead button").forEach((button, column) => {
  button.addEventListener("click", () => {
    const title = button.parentElement, body = title.closest("table").tBodies[0];
    const up = title.getAttribute("aria-sort") === "descending";
    const value = row => { const text = row.cells[column].textContent, number = parseFloat(text);
      return isNaN(number) ? text : number; };
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      const order = typeof x === "number" ? x - y : x.localeCompare(y);
      return up ? order : -order;
    });
    title.parentElement.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  });
});
"""
