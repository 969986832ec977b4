"""torchtitan's own training command on a CPU, which stands in for the accelerator that it looks for.

python -m testing.titan_cpu ARGUMENTS OF TORCHTITAN
"""

import types

import torch
import torch._utils

_STATISTICS = ("active_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms")
_ACCELERATOR = {
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "cpu",
    "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=1 << 34, name="cpu"),
    "memory_stats": lambda device=None: dict.fromkeys(_STATISTICS, 0),
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "manual_seed": torch.manual_seed,
}


def main() -> None:
    """Train."""
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, function in _ACCELERATOR.items():
        setattr(torch.cpu, name, function)
    from torchtitan import train

    train.main(train.Trainer)


if __name__ == "__main__":
    main()
