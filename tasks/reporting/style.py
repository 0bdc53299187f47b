"""The style sheet of a report's page: light and dark as the reader's system is, and light on paper."""

_LIGHT = """
  --paper: #fbfaf8; --ink: #22262b; --quiet: #5f656d; --line: #c9c4bb; --faint: #e6e2da; --stone: #ffffff;
  --mark: #2f6f62; --bar: #7fb3a6; --doubtful: #c3bdb2; --chance: #b4530f; --majority: #7a4fb0; --bad: #b3261e;
"""
_DARK = """
  --paper: #16181b; --ink: #e6e4df; --quiet: #a3a9b1; --line: #41464d; --faint: #2c3036; --stone: #1f2327;
  --mark: #7cc4b3; --bar: #3f8576; --doubtful: #565c64; --chance: #f0a05a; --majority: #c3a2f2; --bad: #ff8a80;
"""
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: .94rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }}
h3 {{ font-size: .95rem; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .25rem 0 .75rem; color: var(--quiet); max-width: 62rem; }}
a {{ color: var(--mark); }}
sup {{ font-size: .7em; line-height: 0; margin-left: .15em; }}
sup a {{ text-decoration: none; }}
.quiet {{ color: var(--quiet); font-weight: 400; }}
.card {{ border: 1px solid var(--line); border-radius: 12px; background: var(--stone); padding: .75rem 1rem;
  overflow-x: auto; }}
.card + .card {{ margin-top: .9rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }}
th {{ text-align: left; font-weight: 600; color: var(--quiet); vertical-align: bottom; }}
th, td {{ padding: .22rem .6rem .22rem 0; border-bottom: 1px solid var(--faint); }}
tr:last-child > td {{ border-bottom: 0; }}
td.task {{ overflow-wrap: anywhere; min-width: 9.5rem; }}
th.number, td.number {{ text-align: right; white-space: nowrap; }}
th.number {{ white-space: normal; overflow-wrap: break-word; max-width: 9rem; }}
td.drawing, th.drawing {{ padding-left: .4rem; }}
td.prose {{ overflow-wrap: anywhere; min-width: 4.5rem; white-space: pre-wrap; vertical-align: top; }}
.own {{ font-weight: 600; }}
.tag {{ white-space: nowrap; font-size: .85rem; color: var(--chance); }}
.better {{ color: var(--mark); font-weight: 600; }}
.worse {{ color: var(--bad); font-weight: 600; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .25rem 1.4rem; margin: 0 0 .6rem; padding: 0; list-style: none;
  color: var(--quiet); font-size: .9rem; }}
.legend li {{ display: flex; align-items: center; gap: .45rem; }}
.parts {{ columns: 29rem 2; column-gap: 2rem; }}
.kind {{ break-inside: avoid; padding: .3rem 0; }}
.kind h3 {{ color: var(--quiet); }}
.part {{ display: grid; grid-template-columns: minmax(0, 1fr) auto 7.8rem; gap: .6rem; align-items: center;
  break-inside: avoid; font-size: .9rem; font-variant-numeric: tabular-nums; }}
.part > :first-child {{ overflow-wrap: anywhere; line-height: 1.2; }}
.part > :last-child {{ text-align: right; white-space: nowrap; line-height: 1.15; padding: .15rem 0; }}
.part .tag {{ display: block; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .9rem; }}
.charts .card {{ break-inside: avoid; padding: .6rem .8rem; margin: 0; }}
.charts h3 {{ display: flex; justify-content: space-between; gap: 1rem; }}
.charts h3 > :last-child {{ white-space: nowrap; }}
svg {{ display: block; max-width: none; }}
.charts svg {{ width: 100%; height: auto; }}
svg text {{ fill: var(--quiet); font-size: 12px; font-weight: 400; font-variant-numeric: tabular-nums; }}
.grid {{ stroke: var(--faint); }}
.zero {{ stroke: var(--quiet); stroke-dasharray: 2 2; }}
.bar {{ fill: var(--bar); }}
.doubtful {{ fill: var(--doubtful); }}
.error {{ fill: none; stroke: var(--ink); stroke-width: 1.4; }}
.chance {{ stroke: var(--chance); stroke-width: 2; stroke-dasharray: 4 2; }}
.majority {{ stroke: var(--majority); stroke-width: 2; }}
.tick {{ fill: var(--quiet); stroke: var(--stone); stroke-width: .6; }}
.interval {{ fill: none; stroke: var(--quiet); stroke-width: 1.6; }}
.line {{ fill: none; stroke: var(--mark); stroke-width: 2; }}
.band {{ fill: var(--bar); opacity: .3; }}
.point {{ fill: var(--mark); stroke: var(--stone); }}
.point.same {{ fill: var(--quiet); }}
.interval.better {{ stroke: var(--mark); }}
.interval.worse {{ stroke: var(--bad); }}
.point.worse {{ fill: var(--bad); }}
@media (max-width: 44rem) {{
  table svg {{ max-width: 11rem; height: auto; }}
  .part svg {{ max-width: 6rem; height: auto; }}
}}
@page {{ margin: 12mm; }}
@media print {{
  :root {{ color-scheme: light; font-size: 10.5px; {_LIGHT} --paper: #ffffff; }}
  body {{ max-width: none; padding: 0; }}
  .card {{ overflow: visible; padding: .4rem .5rem; }}
  tr {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
  table svg, .part svg {{ max-width: 190px; height: auto; }}
  .parts {{ columns: 2; }}
  .charts {{ grid-template-columns: repeat(3, 1fr); }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
