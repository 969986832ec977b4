"""The `paci` command: it draws, checks, simulates and rehearses schedules, plans a job, and reads recorded runs.

Bad input gives one line on standard error, which names the value, the rule and the remedy, and exit code 2.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import click

from paci_schedule import __version__
from paci_schedule.cli.calibrate import calibrate
from paci_schedule.cli.check import check
from paci_schedule.cli.doctor import doctor
from paci_schedule.cli.plan import plan_
from paci_schedule.cli.profile import profile
from paci_schedule.cli.rehearse import rehearse
from paci_schedule.cli.show import show
from paci_schedule.cli.simulate import simulate_
from paci_schedule.cli.trace import trace_
from paci_schedule.errors import ConfigError, PaciError

__all__ = ["main"]


_ALIASES = {"accumulation": "micro_batches", "micro_batches": "accumulation", "flops": "tflops"}


class _Group(click.Group):
    """The commands; an error that begins with the name of a value names the option instead, as the user writes it."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PaciError as error:
            command = self.commands[str(ctx.invoked_subcommand)]
            options = (param for param in command.params if isinstance(param, click.Option))
            flags = {flag.lstrip("-").replace("-", "_"): flag for option in options for flag in option.opts}
            name = "".join(re.findall(r"^\w*", str(error)))
            flag = flags.get(name) or flags.get(_ALIASES.get(name, ""))
            if flag is None:
                raise
            raise ConfigError(flag + str(error)[len(name) :]) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def _paci() -> None:
    """Draw, check, simulate, plan and rehearse pipeline schedules, and read recorded runs."""


for _command in (show, check, simulate_, plan_, profile, rehearse, trace_, calibrate, doctor):
    _paci.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments`, by default those of the process, and exit."""
    try:
        code = _paci.main(arguments, prog_name="paci", standalone_mode=False) or 0
    except click.exceptions.Abort:
        code = 130
    except (click.ClickException, PaciError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        shows_help = isinstance(error, click.exceptions.NoArgsIsHelpError)
        context = getattr(error, "ctx", None)
        remedy = f" See `{context.command_path} --help`." if context and not shows_help else ""
        click.echo(message if shows_help else f"paci: {message}{remedy}", err=True)
        code = 2
    sys.exit(code)
