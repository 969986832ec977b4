"""The keys that a DeepSpeed config may hold for us: ``"pipeline_schedule"`` and the block ``"paci"``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from paci_schedule import __version__
from paci_schedule.adapters.choice import check_choice
from paci_schedule.adapters.options import LaggingOptions, read
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.pipe.module import PipelineModule

__all__ = ["PaciOptions", "read_schedule", "settings"]

_OF_DRIFT = frozenset(
    {
        "clip",
        "flush_warmup_steps",
        "prediction",
        "prediction_reach",
        "loss_spike",
        "loss_spike_flush_steps",
        "extra_in_flight",
    }
)


@dataclass(frozen=True, kw_only=True)
class PaciOptions(LaggingOptions):
    """The block ``"paci"``."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PaciOptions:
        """The options in a DeepSpeed config.  Raises ConfigError as `options.read` does."""
        block = config.get("paci", {})
        return read(cls, block, f'"paci": {block!r}', lambda name, value: f'"paci": {{"{name}": {value}}}')


def read_schedule(config: Mapping[str, Any]) -> str:
    """The schedule that a DeepSpeed config asks for; DeepSpeed's own, "1f1b", when it says nothing.

    Raises:
        ConfigError: an unknown name, with the nearest valid one; a block ``"paci"`` that is wrong, or without a name.
    """
    options = PaciOptions.read(config)
    if "paci" in config and "pipeline_schedule" not in config:
        raise ConfigError(
            '"paci": {...} without "pipeline_schedule": the options are of no effect; add "pipeline_schedule": '
            '"paci", or "1f1b" for DeepSpeed\'s own schedule, or take the block out'
        )
    name = config.get("pipeline_schedule", "1f1b")
    check_choice(name, f'"pipeline_schedule": {name!r}')
    if schedule(name).flushes and name != "1f1b":  # DeepSpeed's own takes no options: a job may go back to it as it is
        for option in fields(options):
            value = getattr(options, option.name)
            if option.name in _OF_DRIFT and value != option.default:
                raise ConfigError(
                    f'"paci": {{"{option.name}": {value!r}}} with "pipeline_schedule": "{name}": the option is for a '
                    'schedule without a flush after every batch; leave it out, or take "pipeline_schedule": "paci"'
                )
    return name


def settings(config: DeepSpeedConfig, options: PaciOptions, name: str, module: PipelineModule) -> dict[str, Any]:
    """What has to be the same on all ranks, by name as a user writes it; folders may differ."""
    of_paci = {f'"paci": {{"{option}"}}': value for option, value in asdict(options).items() if option != "record"}
    return {
        "the version of paci_schedule": __version__,
        '"pipeline_schedule"': name,
        "the number of stages": module.num_stages,
        '"gradient_accumulation_steps"': config.gradient_accumulation_steps,
        '"gradient_clipping"': config.gradient_clipping,
        **{f'"{key}"': config._param_dict.get(key) for key in ("bf16", "fp16", "zero_optimization")},
        **of_paci,
    }
