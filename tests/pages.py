"""A page of a report as tests read it."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """A page as a browser takes it apart: its elements, its text, its scripts, the rows of its tables."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.scripts, self.text, self.rows = [], {}, "", []
        self._inside, self._in_cell = None, False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs).get("id", str(len(self.scripts)))) if tag in ("script", "style") else None
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data):
        if self._inside:
            if self._inside[0] == "script":
                self.scripts[self._inside[1]] = data
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    @property
    def cells(self):
        return [[cell.strip() for cell in row] for row in self.rows if row]


def assert_asks_for_nothing(page):
    """Every reference is a data URI, a place in the page or a file beside it, and the policy forbids any other."""
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            if name in attributes:
                assert re.match(r"data:image/|#|[^:]*/report\.html$", attributes[name]), (tag, attributes[name][:80])
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", re.sub(r"<script.*?</script>", "", page.source, flags=re.S))
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy.replace("http-equiv", "")
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
