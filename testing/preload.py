"""What the server that ranks fork from imports, so that no rank has to: seconds of PyTorch and DeepSpeed.

DeepSpeed's kernel for communication on the CPU is loaded here too.  Loading takes a lock in the file system; a rank
that is killed meanwhile would leave it locked.
"""

import contextlib

import torch._dynamo
import torch.distributed  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed.pipe
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - for every optimizer under ZeRO or bf16
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
