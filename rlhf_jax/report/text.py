"""Texts and numbers of a run's files, as the page shows them."""

import html
from typing import Any

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def escape(text: Any) -> str:
    r"""Any text as HTML that shows it: markup is escaped; control characters and lone surrogates, which HTML and UTF-8
    cannot hold, stand as Python writes them.

    >>> print(escape('<b title="x">&\x1b'))
    &lt;b title=&quot;x&quot;&gt;&amp;\x1b
    """
    writable = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(writable.translate(_CONTROLS))


def figure_text(value: Any) -> str:
    """A number in few digits; anything else as it is.

    >>> [figure_text(one) for one in (0.81234, 1234567, 12345.678, 12.9, 3e-6, True, "x")]
    ['0.812', '1,234,567', '12,346', '12.90', '3e-06', 'True', 'x']
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"
