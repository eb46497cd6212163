"""The page at ``/hones``, on which people try profiles by hand: plain HTML that calls the server it came from."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PATH = "/hones"
PAGE = Path(__file__).with_name("playground.html").read_bytes()


def _policy() -> str:
    """A Content-Security-Policy: only the script in the page runs, and it can only call the server it came from."""
    (style,) = re.findall(rb"<style>(.*?)</style>", PAGE, re.DOTALL)
    (script,) = re.findall(rb"<script>(.*?)</script>", PAGE, re.DOTALL)
    return (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _source(content: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": _policy(),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
