"""The report: one HTML file that needs nothing else, and runs nothing.

Its own content security policy lets in one style sheet, by digest; no script, no image, no font.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources

from cli.experiments.demo import appendix, sections
from cli.experiments.demo.heatmap import view_symbol
from cli.experiments.demo.result import DemoResult
from cli.experiments.demo.view_section import one_view

TITLE = "kd-cache demo: one teacher, recorded once"


def render_page(result: DemoResult) -> str:
    """The whole report."""
    style = resources.files("cli.experiments").joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    body = "\n".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n{content}\n'
        "</section>"
        for name, heading, content in (
            ("table", "Four ways, one table", sections.table(result)),
            ("accuracy", "Accuracy, epoch by epoch", sections.accuracy(result)),
            ("costs", "What a step costs", sections.costs(result)),
            ("losses", "The same losses", sections.losses(result)),
            ("cells", "What the teacher said about one view", one_view(result)),
            ("cache", "What the cache holds", appendix.cache(result)),
            ("again", "Run it again", appendix.again(result)),
            ("how", "How this was measured", appendix.method(result)),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{view_symbol(result.sample.pixels_HW3)}\n<main>\n{sections.opening(result)}\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )
