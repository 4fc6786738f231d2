"""The style of the report."""

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #dde3ea; --good: #1f7a4d; --bad: #b3261e; }
body { margin: 0; background: #f6f8fa; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 0 0 8px; }
main > p { max-width: 78ch; }
.result { font-size: 46px; line-height: 1.2; margin: 12px 0; color: var(--soft); }
.result strong { color: #2563a8; }
.figures, .cards, .tables { display: grid; gap: 16px; margin: 24px 0 36px; }
.figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); }
.tables { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); align-items: start; }
figure, article, .tables > div { margin: 0; padding: 16px; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure img { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 14px; }
article img { width: 192px; max-width: 100%; border: 1px solid var(--line); }
.question { margin: 8px 0; font-weight: 600; }
.question span { color: var(--soft); font-weight: 400; }
h3 { margin: 8px 0 2px; font-size: 13px; }
.chosen { color: var(--good); }
.rejected { color: var(--bad); }
pre { margin: 0; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 3px 0; text-align: left; font-weight: 400; border-top: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 760px) { .figures { grid-template-columns: 1fr; } }
"""
