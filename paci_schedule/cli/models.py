"""The model that `paci plan` is given by name: a built-in size, a file, a type of transformers, or one on the hub."""

from __future__ import annotations

from typing import Any

from paci_schedule.errors import ConfigError, nearest
from paci_schedule.plan.models import built_in, load_config

__all__ = ["config_of"]


def config_of(name: str) -> dict[str, Any]:
    """The config of a model.  Only a name with an owner, such as meta-llama/Llama-3-8B, is asked for on the hub.

    Raises:
        ConfigError: there is no such model, or what would know it is not installed.
    """
    config = load_config(name)
    if config is not None:
        return config
    nowhere = f"model={name!r}: not a built-in size ({nearest(name, built_in())}) and no file"
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise ConfigError(
            f"{nowhere}; types and names on the hub need transformers, which is not installed: pip install "
            "transformers, or give a config.json"
        ) from None
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]().get_text_config().to_dict()
    if "/" not in name:
        raise ConfigError(f"{nowhere}, and no type in transformers; give a config.json, or OWNER/NAME for the hub")
    try:
        return _on_the_hub(name).get_text_config().to_dict()
    except Exception as error:  # of transformers, the hub's client or its transport
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{nowhere}, and not on the hub ({reason}); give a config.json") from None


def _on_the_hub(name: str) -> Any:
    """The PretrainedConfig of a model on the Hugging Face hub, or the copy of it on this machine."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        # Asked once: from_pretrained asks for half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return AutoConfig.from_pretrained(name)
