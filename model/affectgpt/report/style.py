"""The page's style sheet: one column of sections, light, dark and print from the same variables."""

LIGHT = """
  --paper: #ffffff; --ink: #1c2126; --muted: #69727d; --line: #e3e6ea; --wash: #f5f6f8;
  --before: #d08526; --after: #1f63b5; --good: #1d7a46; --bad: #b3382c;
  --c1: #1f63b5; --c2: #d08526; --c3: #2a8f7e; --c4: #a2489b; --c5: #7a8b2e; --c6: #c2503f; --c7: #5b6cc9;
  --c8: #8a6f4d;
"""
DARK = """
  --paper: #14171a; --ink: #e6e9ec; --muted: #98a2ad; --line: #2d3339; --wash: #1c2024;
  --before: #e6a04a; --after: #6ea8ef; --good: #5cc48a; --bad: #ee8277;
  --c1: #6ea8ef; --c2: #e6a04a; --c3: #55bfad; --c4: #cf86c8; --c5: #a9ba5c; --c6: #e88474; --c7: #97a4f0;
  --c8: #bfa27e;
"""

CSS = f"""
:root {{ color-scheme: light dark; {LIGHT}
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; max-width: 1120px; padding: 40px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--font); font-variant-numeric: tabular-nums; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }}
header {{ border-bottom: 2px solid var(--ink); padding-bottom: 14px; }}
h1 {{ font-size: 28px; line-height: 1.2; letter-spacing: -.015em; margin: 0; font-weight: 650; }}
h2 {{ font-size: 19px; letter-spacing: -.01em; margin: 52px 0 4px; font-weight: 650; }}
h3 {{ font-size: 14px; margin: 26px 0 8px; font-weight: 650; }}
p {{ margin: 4px 0 12px; max-width: 74ch; }}
.sub, .note, figcaption .key, small {{ color: var(--muted); }}
.sub {{ margin: 4px 0 0; }}
.note {{ font-size: 13px; font-weight: 400; }}
nav {{ font-size: 13px; margin-top: 10px; display: flex; flex-wrap: wrap; gap: 2px 18px; }}
a {{ color: var(--after); text-decoration: none; }}
a:hover {{ text-decoration: underline; }}
b, strong {{ font-weight: 650; }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}

.figures {{ display: flex; flex-wrap: wrap; gap: 0 44px; margin: 22px 0 4px; }}
.figures div {{ padding: 4px 0; }}
.figures span {{ display: block; font-size: 13px; color: var(--muted); }}
.figures strong {{ font-size: 34px; line-height: 1.15; font-weight: 600; letter-spacing: -.02em; }}
.figures em {{ font-style: normal; font-size: 14px; font-weight: 600; letter-spacing: 0; margin-left: 4px; }}
.good {{ color: var(--good); }}
.bad {{ color: var(--bad); }}

.scroll {{ overflow-x: auto; margin: 10px 0 6px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th {{ text-align: left; font-weight: 500; color: var(--muted); font-size: 12.5px; vertical-align: bottom; }}
th, td {{ padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); }}
td {{ vertical-align: top; }}
th:last-child, td:last-child {{ padding-right: 0; }}
.n {{ text-align: right; white-space: nowrap; }}
tr.control td {{ color: var(--muted); }}
td small {{ display: block; font-size: 12px; line-height: 1.35; }}
tr.main td:first-child {{ font-weight: 650; }}
tr.main td small {{ font-weight: 400; }}
.headline td {{ vertical-align: middle; }}
.bars {{ width: 34%; min-width: 150px; }}
.bar {{ position: relative; height: 18px; background: var(--wash); }}
.bar i {{ position: absolute; inset: 0 auto 0 0; background: var(--muted); opacity: .55; }}
.bar i.before {{ background: var(--before); opacity: 1; }}
.bar i.after {{ background: var(--after); opacity: 1; }}
.bar u {{ position: absolute; top: 8px; height: 2px; background: var(--ink); opacity: .75; }}

.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 26px 30px;
  margin: 16px 0 8px; }}
figure {{ margin: 0; min-width: 0; break-inside: avoid; display: flex; flex-direction: column; }}
.panels figure {{ justify-content: space-between; }}
figcaption {{ font-size: 13px; line-height: 1.4; margin-bottom: 4px; }}
figcaption b {{ display: block; font-size: 14px; }}
.key {{ display: inline-block; white-space: nowrap; margin-right: 12px; }}
.key::before {{ content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 5px; vertical-align: -1px;
  background: var(--k); }}
.key.truth::before {{ background: color-mix(in srgb, var(--muted) 25%, transparent);
  border-top: 2px solid var(--ink); }}
.key.miss::before {{ opacity: .35; }}
.wheel svg {{ max-width: 400px; }}
.scroll + p {{ margin-top: 14px; }}

.clip {{ display: grid; grid-template-columns: 228px minmax(0, 1fr); gap: 6px 22px; padding: 14px 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; }}
.frames {{ display: flex; gap: 3px; height: 74px; }}
.frames img {{ width: 74px; height: 74px; object-fit: cover; background: var(--wash); }}
.frames.none {{ width: 228px; align-items: center; justify-content: center; background: var(--wash);
  color: var(--muted); font-size: 12px; text-align: center; padding: 0 10px; }}
.clip .id {{ font: 12px/1.4 var(--mono); color: var(--muted); overflow-wrap: anywhere; margin-top: 5px; }}
.clip q {{ display: block; margin-bottom: 5px; quotes: "“" "”"; }}
.clip dl {{ display: grid; grid-template-columns: 92px minmax(0, 1fr) auto; gap: 4px 10px; margin: 0; }}
dt {{ color: var(--muted); font-size: 13px; }}
dd {{ margin: 0; }}
dd.f {{ text-align: right; white-space: nowrap; }}
.raw {{ font: 12px/1.45 var(--mono); color: var(--muted); white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 2px 0 0; }}
.label {{ display: inline-block; padding: 0 7px; margin: 1px 4px 2px 0; border: 1px solid var(--line); font-size: 13px;
  line-height: 1.55; border-radius: 3px; overflow-wrap: anywhere; }}
.label.hit::before {{ content: "✓ "; }}
.label.hit {{ border-color: var(--good); color: var(--good); }}
.label.miss {{ border-color: var(--bad); color: var(--bad); }}
.label.unknown {{ border-style: dashed; color: var(--muted); }}
.group {{ margin: 18px 0 22px; break-inside: avoid; }}
.group td:first-child {{ min-width: 220px; }}
.group th:nth-child(2) {{ width: 200px; min-width: 150px; }}
.group .n {{ width: 74px; }}

pre {{ font: 12px/1.5 var(--mono); background: var(--wash); padding: 14px 16px; margin: 8px 0; white-space: pre-wrap;
  overflow-wrap: anywhere; columns: 2 340px; column-gap: 32px; }}
.facts {{ width: auto; }}
.facts td {{ padding-right: 28px; overflow-wrap: anywhere; }}
.facts td:first-child {{ color: var(--muted); white-space: nowrap; }}
.warn {{ border-left: 3px solid var(--bad); padding: 2px 0 2px 12px; }}

@media (max-width: 640px) {{
  body {{ padding: 22px 16px 48px; }}
  h1 {{ font-size: 23px; }}
  .figures {{ gap: 0 28px; }}
  .figures strong {{ font-size: 27px; }}
  .clip {{ grid-template-columns: minmax(0, 1fr); }}
  .clip dl {{ grid-template-columns: 86px minmax(0, 1fr) auto; }}
  .bars {{ min-width: 90px; }}
  .wide {{ display: none; }}
}}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10.5pt; }}
  nav {{ display: none; }}
  h2, h3 {{ break-after: avoid; }}
  .grid {{ grid-template-columns: repeat(3, 1fr); gap: 16px; }}
  tr {{ break-inside: avoid; }}
  @page {{ margin: 14mm; }}
}}
"""
