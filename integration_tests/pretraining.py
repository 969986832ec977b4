"""The pretrain_gpt.py of a Megatron-LM checkout, started as users start it, and what it logs and saves.

MEGATRON_LM_CHECKOUT names the checkout; several, separated by ':', are tried one after the other.
"""

import os
import pickle
import re
import warnings
from types import SimpleNamespace

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from testing.megatron_lm import ROOT, logged, pretrained

__all__ = ["CHECKOUTS", "ROOT", "distributed", "logged", "pretrain", "validated", "weights"]

CHECKOUTS = [path for path in os.environ.get("MEGATRON_LM_CHECKOUT", "").split(os.pathsep) if path]


def pretrain(*job, expect=0, **more):
    """Run the script (see `testing.megatron_lm.pretrained`); returns what it wrote."""
    run = pretrained(*job, **more)
    assert (run.returncode == 0) == (expect == 0), run.stdout[-6000:]
    return run.stdout


def validated(output):
    return re.findall(r"validation loss at (iteration \d+) .*?lm loss value: (\S+)", output)


class Left(pickle.Unpickler):
    """Loads tensors, and leaves out what would need Megatron."""

    def find_class(self, module, name):
        if module.partition(".")[0] in ("megatron", "argparse"):
            return type(name, (), {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None})
        return super().find_class(module, name)


def weights(folder):
    """name -> tensor, of a rank's checkpoint in Megatron's format "torch"."""
    pickled = SimpleNamespace(__name__="left", Unpickler=Left, load=None)
    saved = torch.load(f"{folder}/model_optim_rng.pt", weights_only=False, pickle_module=pickled)
    return {name: value for name, value in saved["model"].items() if isinstance(value, torch.Tensor)}


def distributed(folder):
    """name -> tensor, of a checkpoint in Megatron's format "torch_dist"."""
    reader = FileSystemReader(folder)
    found = {
        name: torch.zeros(each.size, dtype=each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # that one process loads alone
        load(found, storage_reader=reader)
    return found
