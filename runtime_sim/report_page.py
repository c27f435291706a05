"""A timing run as one HTML file: drawings are plain SVG, the numbers are embedded as JSON, nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from runtime_sim import report_drawings as draw
from runtime_sim.analysis import Analysis
from runtime_sim.engines import KINDS
from runtime_sim.report_data import report_data

STYLE = """:root{--line:#e3e6ea;--ink:#1f2933;--soft:#66727f;--mark:#2a6f97}*{box-sizing:border-box}
body{font:14px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif;margin:0;color:var(--ink);background:#f6f7f9}
header,main{max-width:1220px;margin:0 auto;padding:0 24px}header{padding-top:20px}h1{font-size:20px;margin:0}
h2{font-size:16px;margin:22px 0 4px}p{margin:4px 0;color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0}
.fact{background:#fff;border:1px solid var(--line);border-radius:8px;padding:6px 12px}
.fact b{display:block;font-size:15px;color:var(--ink)}.fact span{color:var(--soft);font-size:12px}
nav{display:flex;flex-wrap:wrap;gap:4px;border-bottom:1px solid var(--line);margin-top:10px}
nav button{font:inherit;border:0;background:none;padding:8px 14px;cursor:pointer;color:var(--soft);
border-bottom:3px solid transparent}nav button.on{color:var(--ink);border-color:var(--mark);font-weight:600}
section{display:none;background:#fff;border:1px solid var(--line);border-top:0;padding:6px 22px 26px}
section.on{display:block}svg{display:block;width:100%;background:#fcfcfd;border:1px solid var(--line)}
text{font:11px system-ui,sans-serif;fill:#33404d}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;width:100%}td,th{padding:3px 10px;text-align:right;
border-bottom:1px solid #eef0f2;white-space:nowrap}td:first-child,th:first-child,td.t,th.t{text-align:left}
td.t{white-space:normal;min-width:150px}th{color:var(--soft);font-weight:600;cursor:pointer;background:#fafbfc}
tr:hover td{background:#f4f8fb}.keys{margin:8px 0}.key{margin-right:16px;white-space:nowrap}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
.lanes{display:flex;margin-top:8px}.labels{width:96px;flex:none;font-size:12px;color:var(--soft)}
.labels div{height:30px;line-height:30px;border:1px solid transparent}.rows{flex:1;min-width:0}
.rows svg{border-width:0 1px 1px;cursor:grab}#axis{display:flex;justify-content:space-between;font-size:11px;
color:var(--soft);padding-top:3px}"""
SCRIPT = """const $=(q,e=document)=>[...e.querySelectorAll(q)];
const data=JSON.parse(document.getElementById('data').textContent);
function view(name){$('nav button').forEach(b=>b.classList.toggle('on',b.dataset.view===name));
$('section').forEach(s=>s.classList.toggle('on',s.id==='view-'+name))}
$('nav button').forEach(b=>b.addEventListener('click',()=>{view(b.dataset.view);history.replaceState(null,'','#'+
b.dataset.view)}));
const names=$('nav button').map(b=>b.dataset.view),asked=location.hash.slice(1);
view(names.includes(asked)?asked:names[0]);
const rows=$('.rows svg'),full=1100;let x=0,w=full;
function show(){w=Math.max(full/1e5,Math.min(w,full));x=Math.max(0,Math.min(x,full-w));
rows.forEach(s=>s.setAttribute('viewBox',x+' 0 '+w+' '+s.viewBox.baseVal.height));
const axis=document.getElementById('axis');axis.replaceChildren(...[0,1,2,3,4,5,6,7,8].map(i=>{
const e=document.createElement('span'),at=(x+w*i/8)/full*data.microseconds;
e.textContent=at.toLocaleString('en',{maximumFractionDigits:w<full/50?3:1})+' us';return e}))}
let from=null;rows.forEach(s=>{s.addEventListener('wheel',e=>{e.preventDefault();const b=s.getBoundingClientRect(),
f=(e.clientX-b.left)/b.width,at=x+f*w;w=Math.max(full/1e5,Math.min(full,w*(e.deltaY<0?0.8:1.25)));x=at-f*w;show()},
{passive:false});s.addEventListener('pointerdown',e=>{from=e.clientX});
s.addEventListener('pointermove',e=>{if(from!==null){x-=(e.clientX-from)*w/s.getBoundingClientRect().width;
from=e.clientX;show()}});s.addEventListener('dblclick',()=>{x=0;w=full;show()})});
window.addEventListener('pointerup',()=>{from=null});if(rows.length)show();
$('th').forEach(h=>h.addEventListener('click',()=>{const t=h.closest('table'),i=[...h.parentNode.children].indexOf(h),
down=h.dataset.down!=='1',value=r=>{const c=r.children[i].textContent,n=parseFloat(c.replace(/[,%]/g,''));
return isNaN(n)?c:n};h.dataset.down=down?'1':'0';$('tr',t).slice(1).sort((a,b)=>{const p=value(a),q=value(b);
return (p<q?1:p>q?-1:0)*(down?1:-1)}).forEach(r=>r.parentNode.append(r))}));"""


def write_report(analysis: Analysis, path: str | Path, title: str = "", changed: str = "") -> None:
    """Write the report of a run. changed: what a what-if run changed, in words."""
    Path(path).write_text(page(report_data(analysis), title, changed), encoding="utf-8")


def page(data: dict[str, Any], title: str = "", changed: str = "") -> str:
    """The HTML text for the numbers of `report_data`."""
    views = {
        "Overview": _overview(data),
        "Timeline": _timeline(data),
        "Stalls": _stalls(data),
        "Roofline": _roofline(data),
        "Memory": _memory(data),
        "Operations": _operations(data),
        "Layers": _layers(data),
    }
    name = escape(title or "timing report")
    embedded = json.dumps(data).replace("<", "\\u003c")
    buttons = "".join(f'<button data-view="{v.lower()}">{v}</button>' for v in views)
    body = "".join(f'<section id="view-{v.lower()}">{content}</section>' for v, content in views.items())
    about = f"{data['machine']}, {data['mode']} mode" + (f". What if: {changed}" if changed else "")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
        f"<body><header><h1>{name}</h1><p>{escape(about)}</p>{_facts(data)}</header>"
        f'<main><nav>{buttons}</nav>{body}</main><script type="application/json" id="data">{embedded}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _facts(data: dict[str, Any]) -> str:
    facts = [
        (f"{data['cycles']:,.0f} cycles", f"{data['microseconds']:,.1f} us"),
        (f"{data['instructions']:,}", f"instructions on {data['units']} unit(s)"),
        (f"{data['mac_utilisation']:.1%}", "of the multipliers' time used"),
        (f"{data['hbm_utilisation']:.1%}", "of the HBM bandwidth used"),
        (f"{data['collective_share']:.1%}", "of the critical path in collectives"),
        (_energy(*data["energy_joules"]), "board energy"),
    ]
    if data["bounds"] is not None:
        at_least, at_most = data["bounds"]["lower"], data["bounds"]["upper"]
        facts.insert(
            1, (f"{at_least:,.0f} to {at_most:,.0f}", f"cycles are possible; bound by {data['bounds']['binds']}")
        )
    cells = (f'<div class="fact"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in facts)
    return f'<div class="facts">{"".join(cells)}</div>'


def _energy(low: float, high: float) -> str:
    return f"{low:,.2f} to {high:,.2f} J" if high >= 1 else f"{low * 1e3:,.3f} to {high * 1e3:,.3f} mJ"


def _unit(data: dict[str, Any]) -> str:
    return f"unit {data['unit']} ({data['unit_name']}), which finishes last"


def _heading(title: str, words: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(words)}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str, texts: Sequence[int] = ()) -> str:
    """A table; columns in `texts` hold words that may wrap."""

    def cells(tag: str, row: Sequence[str]) -> str:
        marked = (' class="t"' if i in texts else "" for i in range(len(row)))
        return "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marked, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table id="{name}"><tr>{cells("th", head)}</tr>{body}</table></div>'


def _account(data: dict[str, Any], name: str) -> str:
    total = f"{data['cycles']:,.0f}"
    words = (
        f"{_unit(data)}: every row sums to {total} cycles. Passes of Main and Sub hold VE; TDMA and PDMA transfer "
        "(PDMA to other cards), Core notifies and waits."
    )
    return _heading("Where the cycles go", words) + draw.engines(data, name)


def _overview(data: dict[str, Any]) -> str:
    total = data["cycles"] or 1.0
    rows = [
        [draw.plain(o["location"]), f"{o['path_cycles']:,.0f}", f"{o['path_cycles'] / total:.1%}", _why(o)]
        for o in data["operations"][:12]
    ]
    head = ("operation", "path cycles", "share", "why")
    top = _heading("Operations on the critical path", "The twelve that take most of it; all: see Operations.")
    return _account(data, "engines") + top + _table(head, rows, "top-operations", (3,))


def _timeline(data: dict[str, Any]) -> str:
    shown = f"{data['spans_total']:,} spans as {len(data['spans']):,} rectangles"
    path = f"{data['path_total']:,} segments of the critical path as {len(data['path']):,}"
    words = (
        f"{_unit(data)}: {shown}, {path}; neighbours too small to see are drawn as one (a trace has each). "
        "Wheel: zoom, drag: move, double click: all."
    )
    return _heading("Timeline", words) + draw.timeline(data)


def _stalls(data: dict[str, Any]) -> str:
    total = data["cycles"] or 1.0
    sums = [
        [engine, *(f"{kinds[k]:,.0f}" for k in KINDS), f"{sum(kinds.values()):,.0f}"]
        for engine, kinds in data["engines"].items()
    ]
    rows = [
        [c["engine"], c["kind"], c["cause"], f"{c['times']:,}", f"{c['cycles']:,.0f}", f"{c['cycles'] / total:.1%}"]
        for c in sorted(data["causes"], key=lambda c: -c["cycles"])
        if c["cycles"] >= 0.5 and c["kind"] in ("wait", "sync", "contention")
    ]
    named = _heading("By cause", "The instruction or resource that each engine waits for; the largest are named.")
    return (
        _account(data, "engines-again")
        + _table(("engine", *KINDS, "sum"), sums, "stall-table")
        + named
        + _table(("engine", "kind", "cause", "times", "cycles", "share"), rows, "causes", (1, 2))
    )


def _roofline(data: dict[str, Any]) -> str:
    rows = [
        [
            draw.plain(p["location"]),
            f"{p['intensity']:,.3g}" if p["intensity"] else "",
            f"{p['attained']:,.1f}",
            f"{p['bound']:,.1f}" if p["bound"] else "",
            f"{p['attained'] / p['bound']:.0%}" if p["bound"] else "",
            p["by"],
            *(f"{p[name]:,}" for name in ("hbm_bytes", "dm_bytes", "noc_bytes", "pcie_bytes")),
        ]
        for p in sorted(data["roofline"]["points"], key=lambda p: -p["cycles"])
    ]
    head = ("operation", "MACs/B", "attained", "bound", "of it", "by", "HBM B", "DM B", "NoC B", "PCIe B")
    words = f"{_unit(data)}. Attained and bound: MACs a cycle, of operations without MACs bytes of HBM a cycle."
    return _heading("Roofline", words) + draw.roofline(data) + _table(head, rows, "roofline-table", (5,))


def _memory(data: dict[str, Any]) -> str:
    out = ""
    for number, row in enumerate(data["memory"]):
        stays = ", ".join(f"{name} {size:,} B" for name, size in row["resident"].items() if size)
        words = (
            f"Live bytes over time, by the operation that wrote them; at most {row['peak_bytes']:,} of "
            f"{row['capacity']:,} B, at cycle {row['peak_cycle']:,.0f}." + (f" Always there: {stays}." if stays else "")
        )
        out += _heading(row["memory"], words) + draw.memory(row, number, data["cycles"])
        rows = [[name, f"{size:,}", f"{size / row['peak_bytes']:.1%}"] for name, size in row["peak_by"].items()]
        out += _table(("at the peak, written by", "bytes", "share"), rows, f"peak-{number}")
    return out


def _why(row: dict[str, Any]) -> str:
    causes = sorted(row["causes"].items(), key=lambda i: -i[1])[:3]
    return ", ".join(f"{k} {v:,.0f}" for k, v in causes if v >= 0.5)


def _operations(data: dict[str, Any]) -> str:
    total = data["cycles"] or 1.0
    rows = [
        [
            draw.plain(o["location"]), f"{o['path_cycles']:,.0f}", f"{o['path_cycles'] / total:.1%}", _why(o),
            ", ".join(f"{k} {v:,.0f}" for k, v in list(o["waits"].items())[:2]),
            f"{o['main']:,.0f}", f"{o['sub']:,.0f}", f"{o['dma']:,.0f}",
        ]
        for o in data["operations"]
    ]  # fmt: skip
    head = ("operation", "path cycles", "share", "why", "waits for", "main", "sub", "dma")
    words = "Path cycles: of the critical path, the column sums to the makespan. The others: cycles of all units."
    return _heading("Operations", words) + _table(head, rows, "operations", (3, 4))


def _layers(data: dict[str, Any]) -> str:
    total = data["cycles"] or 1.0
    rows = [[name, f"{cycles:,.0f}", f"{cycles / total:.1%}"] for name, cycles in data["layers"].items()]
    words = "Cycles of the critical path; they sum to the makespan."
    layers = _heading("Layers", words) + _table(("layer", "path cycles", "share"), rows, "layers")
    groups = [
        [g["layer"], draw.plain(g["location"]), f"unit {g['unit']} {g['context']}", f"{g['instructions']:,}",
         f"{g['cycles']:,.0f}", f"{g['cycles'] / total:.1%}"]
        for g in data["path_groups"]
    ]  # fmt: skip
    head = ("layer", "operation", "where", "instructions", "path cycles", "share")
    words = "The largest parts of the critical path by layer, operation, unit and context."
    return layers + _heading("Critical path", words) + _table(head, groups, "path-groups", (1, 2))
