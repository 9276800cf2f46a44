"""Style sheet of the report page; colours come from theme.css_variables."""

STYLE = """
:root{--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.5 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.01em;margin:0 0 6px}
h2{font-size:20px;line-height:1.3;margin:0 0 4px}
section{margin-top:52px}
section>p{max-width:78ch;margin:0 0 16px;color:var(--ink-2)}
header{margin-bottom:28px}
.facts,.missing{color:var(--ink-2);margin:0}
.missing{margin-top:28px;font-size:14px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:color-mix(in srgb,var(--ink) 5%,var(--surface));border-radius:8px;padding:12px 14px;
 overflow:auto;margin:14px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
details{margin-top:20px}
summary{cursor:pointer;color:var(--ink-2)}
figure{margin:0;border:1px solid var(--grid);border-radius:12px;padding:14px;overflow-x:auto}
figure svg{display:block;width:100%;min-width:640px;height:auto}
figure svg text{font-family:var(--sans)!important}
.cards,.compare{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(196px,1fr))}
.compare{grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));margin:28px 0 14px}
.card{border:1px solid var(--grid);border-radius:12px;padding:16px 18px 14px;display:flex;
 flex-direction:column}
.card h3{font-size:15px;line-height:1.35;margin:0 0 10px}
.card h3 small{display:block;font-weight:400}
small{font-size:13px;color:var(--ink-2)}
.value{margin:0 0 10px;padding-left:11px;border-left:3px solid var(--key);line-height:1.35;
 font-variant-numeric:tabular-nums}
.value span{display:block}
.value .key{font-size:13px;color:var(--ink-2)}
.value .from{display:inline;color:var(--ink-2)}
.value b{font-size:21px}
.value small{display:block}
.ratio{margin:0 0 8px;font-size:15px}
.ratio b{font-size:40px;line-height:1.1;margin-right:6px;letter-spacing:-.02em}
.split{display:flex;flex-wrap:wrap;gap:8px 40px;align-items:center}
.note{margin:0;font-size:14px;color:var(--ink-2);max-width:46ch}
.seeds{width:auto;font-size:14px;font-variant-numeric:tabular-nums}
.seeds td,.seeds th{padding:4px 14px;text-align:right}
.seeds td:first-child{text-align:left;padding-left:0}
.verdict{margin:auto 0 0;padding-top:8px;font-size:14px;font-weight:600}
.met{color:var(--good)}
.not-met{color:var(--bad)}
@media (max-width:560px){main{padding:24px 16px 48px}}
.warnings{margin-top:24px;border:1px solid var(--bad);border-left-width:5px;border-radius:8px;
 padding:14px 18px}
.warnings h2{font-size:16px}
.warnings ul{margin:0;padding-left:20px}
.scroll{overflow-x:auto;border:1px solid var(--grid);border-radius:12px}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th,td{padding:10px 14px;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-size:13px;font-weight:600;color:var(--ink-2);white-space:nowrap}
.answers{table-layout:fixed;min-width:820px}
.answers td{overflow-wrap:anywhere}
.answers .question small{display:block;margin-top:6px}
.answers .question i{font-style:normal;font-weight:600}
.group th{background:color-mix(in srgb,var(--ink) 4%,var(--surface));font-size:13px;
 text-transform:capitalize}
.mark{display:block;width:fit-content;font-size:12px;font-weight:600;line-height:18px;border-radius:10px;
 padding:0 9px;margin-bottom:5px;border:1px solid currentColor}
.mark.original{color:var(--ink-2)}
.mark.safe_target{color:var(--good)}
.none{color:var(--muted)}
.numbers{font-variant-numeric:tabular-nums;font-size:14px}
.numbers th,.numbers td{padding:7px 12px}
.numbers thead th{white-space:normal;vertical-align:bottom}
.numbers td,.numbers thead th:nth-child(n+2){text-align:right}
.scroll+.scroll{margin-top:14px}
.notes{color:var(--ink-2);font-size:14px;margin:12px 0 0;padding-left:20px}
.numbers tbody th{font-weight:500;white-space:nowrap}
@media print{section{break-inside:avoid}}
"""
