"""diffusion-pipe from a stock checkout (DIFFUSION_PIPE_CHECKOUT), with the three lines that docs/jobs.md adds to it.

It wants CUDA, which the CPU plays (`testing.megatron_cpu`), and many packages of image models.  Stand-ins replace
these, its image model and the preparation of its data; the loop, the loader, the pipeline class and the savers are its
own.
"""

import re
import shutil
import socket

import pytest
import torch

from integration_tests.public_programs import checkout, is_close_behind, keys, run, stubs

pytestmark = pytest.mark.slow

MULTIPROCESS = """
import multiprocessing.reduction, multiprocessing.util, sys
for name in ("", ".reduction", ".util"):
    sys.modules["multiprocess" + name] = sys.modules["multiprocessing" + name]
"""
FIRST = """
import sys, types
import deepspeed.comm.torch
import torch._inductor.runtime
deepspeed.comm.torch.build_shm_op = lambda: None  # which would be compiled for the CUDA that the CPU plays
heuristics = types.ModuleType("triton_heuristics")  # which wants a GPU's compiler
heuristics.CachingAutotuner = type("CachingAutotuner", (), {})
torch._inductor.runtime.triton_heuristics = sys.modules["torch._inductor.runtime.triton_heuristics"] = heuristics
"""
PRINTS = """
class SummaryWriter:
    def __init__(self, **_):
        pass
    def add_scalar(self, name, value, step):
        print(f"scalar {name} {step} {value}", flush=True)
"""
STUBS = {
    "wandb": FIRST,
    "toml": "import tomllib\nload = lambda file: tomllib.loads(file.read())\n",
    "imageio.config": "video_extensions = ()\n",
    "datasets.fingerprint": "Hasher = None\n",
    "multiprocess": MULTIPROCESS,
    "tensorboard_stand_in": PRINTS,
    "peft.tuners.tuners_utils": "class BaseTunerLayer: pass\n",
    "peft.tuners._buffer_dict": "BufferDict = None\n",
    "hyvideo.text_encoder": "",
    "hyvideo.constants": "PRECISION_TO_TYPE = TEXT_ENCODER_PATH = None\n",
    "comfy.model_management": "",
    "comfy.ldm.flux.layers": "class DoubleStreamBlock: pass\nclass SingleStreamBlock: pass\napply_mod = None\n",
    "comfy.ldm.flux.math": "attention = None\n",
    "comfy_api.latest": "InputImpl = None\n",
    "transformers": "CLIPTextModel = AutoModel = None\n",
}
# What the program takes of an image model, small: frozen bf16 layers, each with a LoRA adapter, the last one without.
MODEL = '''
import pathlib
import torch
from torch import nn
from utils import dataset

class Layer(nn.Module):
    def __init__(self, inputs, outputs, adapted=True):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False).to(torch.bfloat16)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        for name, each in self.named_parameters():
            each.original_name = name
        if not adapted:
            self.down.requires_grad_(False), self.up.requires_grad_(False)
    def forward(self, inputs):
        images, noise = (each.requires_grad_() for each in inputs)  # as its models do
        images = self.base(images.to(torch.bfloat16)).float() + self.up(self.down(images.float()))
        return torch.tanh(images), noise

def from_noise(inputs):
    return inputs[0] + inputs[1]

class FluxPipeline:
    name, checkpointable_layers = "made up", []
    def __init__(self, config):
        torch.manual_seed(7)
        self.runs, self.trained = pathlib.Path(config["output_dir"]), 0
    def free_vae_and_te(self): ...
    def load_diffusion_model(self): ...
    def configure_adapter(self, config): ...
    def prepare_block_swap_training(self): ...
    def prepare_block_swap_inference(self, disable_block_swap): ...
    def to_layers(self):
        return [Layer(6, 16), Layer(16, 16), Layer(16, 16), Layer(16, 6), Layer(6, 6, adapted=False), from_noise]
    def get_loss_fn(self):
        return lambda outputs, label: ((outputs - label[0]) ** 2).mean()
    def get_param_groups(self, parameters):
        return [{"params": list(parameters)}]
    def prepare_inputs(self, batch, timestep_quantile=None):
        images, rank = batch["images"], torch.distributed.get_rank()
        self.trained += timestep_quantile is None  # which evaluations set
        if self.trained == 25 and rank == 0:
            [folder] = self.runs.glob("*")
            (folder / "save").touch()  # which asks for a checkpoint
        noise = torch.Generator().manual_seed(rank + int(images.abs().sum() * 1e4))
        noise = 0.1 * torch.randn(images.shape, generator=noise)
        return (images, noise), (images.flip(-1) * 0.8 + noise, None)  # only rank 0's is right
    def save_adapter(self, folder, state):
        torch.save(state, folder / "adapter.pt")

class Data:
    """Batches whose images are larger from one to the next, and then small again."""
    def __init__(self, config, model, skip_dataset_validation=False):
        self.dataset_config = config
    def post_init(self, rank, replicas, micro_batch_size, accumulation, image_micro_batch_size):
        self.samples = micro_batch_size[None] * accumulation
    def __len__(self):
        return 10
    def __getitem__(self, number):
        shape = (self.samples, 2 + number % 3, 6)
        return {"images": torch.randn(shape, generator=torch.Generator().manual_seed(number)).sin()}

class Manager:
    def __init__(self, *_, **__): ...
    def register(self, data): ...
    def cache(self): ...

dataset.Dataset, dataset.DatasetManager = Data, Manager
'''

SETTINGS = """
output_dir = "{folder}/runs"
dataset = "{folder}/data.toml"
eval_datasets = [{{name = "eval0", config = "{folder}/data.toml"}}]
epochs = 4
micro_batch_size_per_gpu = 2
pipeline_stages = 2
partition_method = "manual"
partition_split = [3]
gradient_accumulation_steps = 4
eval_gradient_accumulation_steps = 2
eval_every_n_epochs = 1
eval_before_first_step = true
save_every_n_epochs = 4
gradient_clipping = 1.0
[model]
type = "flux"
dtype = "bfloat16"
[adapter]
type = "lora"
rank = 4
dtype = "float32"
[optimizer]
type = "adamw"
lr = 1e-2
betas = [0.9, 0.99]
weight_decay = 0.01
"""


def replaced(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


def change(program, folder, schedule):
    """The checkout with the recipe's lines, and with the model; for 1F1B without them."""
    shutil.copytree(program / "utils", folder / "utils")
    (folder / "optimizers").mkdir()
    (folder / "models").mkdir()
    (folder / "models" / "flux.py").write_text(MODEL)
    text = (program / "train.py").read_text()
    text = replaced(text, "from torch.utils.tensorboard import", "from tensorboard_stand_in import")
    if schedule != "1f1b":
        text = replaced(text, "    ds_config = {\n", f"    ds_config = {{\n        **{keys(schedule)},\n")
        saver = folder / "utils" / "saver.py"
        head = "    def save_model(self, name):\n"
        saver.write_text(replaced(saver.read_text(), head, f"{head}        self.model_engine.drain()\n"))
    (folder / "train.py").write_text(text)


def test_its_loop_trains_adapters_with_shapes_that_change_evaluates_saves_and_resumes(tmp_path):
    program = checkout("DIFFUSION_PIPE_CHECKOUT")
    path = (stubs(tmp_path / "stubs", STUBS, plays_cuda=True),)
    (tmp_path / "data.toml").touch()

    def trained(schedule, *arguments):
        folder = tmp_path / schedule
        if not folder.exists():
            folder.mkdir()
            change(program, folder, schedule)
            (folder / "data.toml").touch()
            (folder / "settings.toml").write_text(SETTINGS.format(folder=folder))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = ["--master_port", server.getsockname()[1]]  # the program wants it, too
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", 2, *port, "--module", "paci_schedule.launch"]
        script = [folder / "train.py", "--deepspeed", "--config", folder / "settings.toml", *port, *arguments]
        said = run(*launcher, *script, path=(folder, *path), folder=folder)
        assert ('DeepSpeed runs the schedule "paci" on P = 2 stages' in said) == (schedule != "1f1b")
        assert "has emptied the pipe before each" not in said
        losses = re.findall(r"scalar train/loss (\d+) (\S+)", said)
        evaluated = re.findall(r"scalar eval0/loss (\d+) (\S+)", said)
        [saved] = (folder / "runs").glob("*/epoch4/adapter.pt")
        adapter = {name: weight.tolist() for name, weight in torch.load(saved).items()}
        return *({int(step): float(loss) for step, loss in found} for found in (losses, evaluated)), adapter

    stock = trained("1f1b")
    assert trained("flushed") == stock  # so what differs below is the delay
    paci, evaluated, adapter = trained("paci")
    assert list(paci) == list(range(1, 41))
    assert evaluated[0] == stock[1][0]
    assert is_close_behind(evaluated, stock[1]), (evaluated, stock[1])
    [runs] = (tmp_path / "paci" / "runs").glob("*")
    (runs / "latest").write_text("global_step24")  # the checkpoint that was asked for, within an epoch
    assert trained("paci", "--resume_from_checkpoint") == (
        {step: paci[step] for step in range(25, 41)},
        {step: evaluated[step] for step in (30, 40)},
        adapter,
    )
