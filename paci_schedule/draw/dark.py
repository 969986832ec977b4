"""An SVG that is light for a reader whose screen is light, and dark for one whose screen is dark."""

from __future__ import annotations

from paci_schedule.draw.colours import IDLE

__all__ = ["follow_the_reader"]

_STYLE = f"""<style>@media (prefers-color-scheme: dark) {{
  path[style*="fill: #ffffff"] {{ fill: #16181c !important; }}
  [style*="fill: {IDLE}"] {{ fill: #33363d !important; stroke: #33363d; }}
  [style*="stroke: #262626"], [style*="stroke: #000000"] {{ stroke: #dddddd !important; }}
  text {{ fill: #e6e6e6; }}
}}</style>
"""


def follow_the_reader(svg: str) -> str:
    """The text of a picture that matplotlib has drawn, with a style for dark screens."""
    head, mark, rest = svg.partition("<defs>")
    return head + _STYLE + mark + rest
