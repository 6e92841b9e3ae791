"""Evaluations → something a person reads: terminal, Markdown and HTML tables, plots, one self-contained page.

- `html.write_report`: `report.html` and `report.json` from evaluations and kept pictures.
- `tables.terminal_table`, `tables.markdown_table`: the same figures for a terminal and for documents.
- `published`: figures quoted from papers, always in rows of their own.
- `record.read_report`: `report.json` back into evaluations.
"""
