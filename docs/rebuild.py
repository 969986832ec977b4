"""Run the `paci` commands in the documents again: pictures are drawn anew, and printed output is put in its place.

    python docs/rebuild.py            # rewrite the documents
    python docs/rebuild.py --check    # change nothing; exit code 1 where a document is out of date

A command stands in a `console` block, behind `$ paci`; a backslash continues it.  What follows it in the block, up to
the next command, is its output.  A block whose first line is `# not run` is left alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

from paci_schedule import cli

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(^```console\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ paci ((?:.*\\\n)*.*)\n(?:(?!\$ ).*\n)*", re.MULTILINE)


def output_of(command: str) -> str:
    """What `paci COMMAND` prints, run at the top of the repository."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
        cli.main(shlex.split(command.replace("\\\n", " ")))
    return "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())


def rebuilt(text: str) -> str:
    """The document with the output of all its commands as it is now."""

    def block(match: re.Match[str]) -> str:
        opening, body, closing = match.groups()
        if body.startswith("# not run"):
            return match[0]
        return opening + COMMAND.sub(lambda found: f"$ paci {found[1]}\n{output_of(found[1])}", body) + closing

    return BLOCK.sub(block, text)


def main() -> None:
    os.chdir(ROOT)
    stale = []
    for path in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
        text = path.read_text() if path.exists() else ""
        if "$ paci " in text and (now := rebuilt(text)) != text:
            stale.append(str(path))
            if "--check" not in sys.argv:
                path.write_text(now)
    sys.stdout.write("".join(f"out of date: {path}\n" for path in stale))
    sys.exit("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    main()
