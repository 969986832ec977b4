"""Public training programs on DeepSpeed, from stock checkouts, started as users start them, under 1F1B and PACI.

DEEPSPEED_EXAMPLES_CHECKOUT and MEGATRON_DEEPSPEED_CHECKOUT name the checkouts.  Models are tiny, data are made up.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from integration_tests.public_programs import checkout, config, is_close_behind, started
from testing.made_up import token_documents

pytestmark = pytest.mark.slow


TORCHVISION = '''
"""What the program takes of torchvision: a stand-in, with data made up and the checkout's own AlexNet."""
import sys, types
import torch
from alexnet import AlexNet

torch.cuda.set_device = lambda device: None  # which a CPU lacks

class CIFAR10(torch.utils.data.Dataset):
    """Images that are as bright as their class is high."""
    def __init__(self, root, train, download, transform):
        pass
    def __len__(self):
        return 400
    def __getitem__(self, number):
        noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(number))
        return noise * 0.1 + (number % 10 - 4.5) / 2, number % 10

def module(name, **values):
    sys.modules[f"torchvision.{name}"] = found = types.ModuleType(name)
    vars(found).update(values)
    return found

step = lambda *_, **__: None
transforms = module("transforms", Resize=step, CenterCrop=step, ToTensor=step, Normalize=step, Compose=step)
models = module("models", AlexNet=AlexNet, vgg19=None)
datasets = module("datasets", CIFAR10=CIFAR10)
'''


def test_alexnet_of_deepspeed_examples_trains_as_under_1f1b(tmp_path):
    program = checkout("DEEPSPEED_EXAMPLES_CHECKOUT") / "training" / "pipeline_parallelism"
    (tmp_path / "torchvision.py").write_text(TORCHVISION)
    settings = {
        **{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "steps_per_print": 1},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}},
        "gradient_clipping": 0,  # which is 1 by default; in fp32 stock clips by the norm of the first stage alone
    }

    def trained(schedule):
        arguments = f"--deepspeed_config={config(tmp_path, schedule, **settings)} -p 2 --steps=30 --backend gloo"
        said = started(program / "train.py", arguments, path=(tmp_path, program))
        return {int(step): float(loss) for step, loss in re.findall(r"steps: (\d+) loss: (\S+)", said)}

    stock, paci = trained("1f1b"), trained("paci")
    assert trained("flushed") == stock  # so what differs below is the delay
    assert list(paci) == list(range(1, 31))
    paci, stock = tenths(paci), tenths(stock)
    assert is_close_behind(paci, stock), (paci, stock)


def tenths(losses):
    """The means of ten steps each, by the last one."""
    return {last: sum(losses[step] for step in range(last - 9, last + 1)) / 10 for last in (10, 20, 30)}


TINY_GPT = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --weight-decay 0.01
    --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 --bf16 --eval-iters 2 --eval-interval 10 --log-interval 1
    --train-iters 40 --data-impl mmap --split 80,10,10 --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 1
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
    --num-workers 0 --use-cpu-initialization --distributed-backend gloo --pipeline-model-parallel-size 2
    --deepspeed --zero-stage 1
"""


def test_pretrain_gpt_of_megatron_deepspeed_trains_evaluates_saves_and_resumes(tmp_path):
    """Tied, ZeRO-1, bf16, clipped globally."""
    program = checkout("MEGATRON_DEEPSPEED_CHECKOUT")
    if not Path(find_spec("deepspeed").origin).with_name("compression").is_dir():
        pytest.skip("the program imports deepspeed.compression, which this DeepSpeed has not")
    images = tmp_path / "torchvision"  # which it imports for other models
    images.mkdir()
    stand_in = "import sys; from unittest.mock import MagicMock\n"
    stand_in += "".join(
        f"sys.modules['torchvision.{name}'] = {name} = MagicMock()\n" for name in ("transforms", "datasets")
    )
    (images / "__init__.py").write_text(stand_in)
    token_documents(tmp_path / "tokens", words=127)

    def pretrained(schedule, *arguments):
        settings = config(
            tmp_path,
            schedule,
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=4,
            steps_per_print=10,
            gradient_clipping=1.0,
            zero_optimization={"stage": 1},
            zero_allow_untested_optimizer=True,
            bf16={"enabled": True},
            data_types={"grad_accum_dtype": "fp32"},
        )
        flags = f"--deepspeed_config {settings} --data-path {tmp_path / 'tokens'}"
        said = started(program / "pretrain_gpt.py", TINY_GPT, flags, *arguments, path=(tmp_path,))
        trained = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", said)
        validated = re.findall(r"validation loss at iteration (\d+) .*lm loss value: (\S+)", said)
        return [{int(number): float(loss) for number, loss in found} for found in (trained, validated)]

    stock, stock_validated = pretrained("1f1b")
    assert pretrained("flushed") == [stock, stock_validated]  # so what differs below is the delay
    paci, validated = pretrained("paci", f"--save {tmp_path / 'saved'} --save-interval 20")
    assert list(paci) == list(range(1, 41))
    assert is_close_behind(validated, stock_validated), (validated, stock_validated)
    (tmp_path / "saved" / "latest").write_text("global_step20")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("20")
    resumed, again = pretrained("paci", f"--load {tmp_path / 'saved'}")
    assert resumed == {number: paci[number] for number in range(21, 41)}
    assert again == {number: validated[number] for number in (30, 40)}
