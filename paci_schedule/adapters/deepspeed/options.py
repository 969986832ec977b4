"""The keys that a DeepSpeed config may hold for us: ``"pipeline_schedule"`` and the block ``"paci"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paci_schedule.adapters.choice import check_schedule
from paci_schedule.adapters.patience import LONGEST
from paci_schedule.core.staleness import check_reach, interval_of
from paci_schedule.errors import ConfigError, nearest

__all__ = ["PaciOptions", "read_schedule"]


_Count = Annotated[int, Field(ge=0, strict=True)]


class PaciOptions(BaseModel):
    """The block ``"paci"``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout: float = Field(600.0, gt=0, le=LONGEST, allow_inf_nan=False, strict=True)
    """Seconds that a neighbouring stage or a replica may take to answer before this rank gives up with a LinkError."""

    clip: Literal["global", "stage"] = "global"
    """Whose norm "gradient_clipping" limits: the whole model's, with other stages' parts late, or each stage's own."""

    flush_warmup_steps: _Count = 0
    """Updates at the start of training that run 1F1B, for the learning-rate warm-up, where delay hurts most."""

    extra_in_flight: _Count | tuple[_Count, ...] = 0
    """Rounds of slack that hide slow links: a number for each link, or one for all together (`PipelineSpec`)."""

    early_receives: Annotated[bool, Field(strict=True)] = False
    """Post the receives of gradients one op earlier, for stages that differ.  On NCCL a job in which anything waits for
    the whole device then hangs (`paci_schedule.core.lower`)."""

    prediction: Any = "off"
    """Which stale forwards run on predicted weights: "off", "window", "every" or every k-th (`predict.prediction`)."""

    prediction_reach: Any = 1.0
    """How far along the expected update these weights lie, with "every"; 1 is the next weights."""

    record: str | None = None
    """Folder to record runs in: at every drain, each rank's newest ops with their times, for ``paci trace``."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PaciOptions:
        """The options in a DeepSpeed config.

        Raises:
            ConfigError: an unknown key, with the nearest valid one, or a value outside its range.
        """
        block = config.get("paci", {})
        if not isinstance(block, Mapping):
            raise ConfigError(f'"paci": {block!r}: must be a block of options, for example {{"timeout": 600}}')
        for key in block:
            if key not in cls.model_fields:
                raise ConfigError(
                    f'"paci": {{"{key}": ...}}: unknown option; valid are {nearest(key, cls.model_fields)}'
                )
        try:
            options = cls(**block)
        except ValidationError as error:
            first = error.errors()[0]
            key, rule = first["loc"][0], first["msg"]
            field = cls.model_fields[key]
            if first["type"] == "literal_error":
                rule = f"valid are {nearest(str(block[key]), get_args(field.annotation))}"
            said = f'"paci": {{"{key}": {block[key]!r}}}'
            raise ConfigError(f"{said}: {rule} (default: {field.default!r})") from None
        interval_of(options.prediction, f'"paci": {{"prediction": {options.prediction!r}}}')
        said = f'"paci": {{"prediction_reach": {options.prediction_reach!r}}}'
        check_reach(options.prediction_reach, options.prediction, said)
        return options


def read_schedule(config: Mapping[str, Any]) -> str:
    """The schedule that a DeepSpeed config asks for; DeepSpeed's own, "1f1b", when it says nothing.

    Raises:
        ConfigError: an unknown name, with the nearest valid one; a block ``"paci"`` that is wrong, or without a name.
    """
    if "paci" in config:
        PaciOptions.read(config)
        if "pipeline_schedule" not in config:
            raise ConfigError(
                '"paci": {...} without "pipeline_schedule": the options are of no effect; add "pipeline_schedule": '
                '"paci", or "1f1b" for DeepSpeed\'s own schedule, or take the block out'
            )
    name = config.get("pipeline_schedule", "1f1b")
    return check_schedule(name, f'"pipeline_schedule": {name!r}')
