"""The cut GPT-2 is the Hugging Face one: the same outputs, losses, gradients and initial weights."""

import os

import pytest
import torch
from torch.utils.file_baton import FileBaton

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from transformers import GPT2LMHeadModel

from launch import train_gpt
from launch.errors import LaunchError
from launch.gpt2 import SIZES, gpt2_config, gpt2_layers, next_token_loss

VOCABULARY, LENGTH = 97, 24


@pytest.fixture
def config():
    return gpt2_config("tiny", vocabulary=VOCABULARY, sequence_length=LENGTH, blocks=3)


def built(config):
    return [spec.build() for spec in gpt2_layers(config)]


def pairs(layers, whole):
    """Every parameter of the layers beside the one of the whole model."""
    embedding, *blocks, head = layers
    yield embedding.wte.weight, whole.transformer.wte.weight
    yield embedding.wpe.weight, whole.transformer.wpe.weight
    for block, other in zip(blocks, whole.transformer.h, strict=True):
        yield from zip(block.parameters(), other.parameters(), strict=True)
    yield from zip(head.ln_f.parameters(), whole.transformer.ln_f.parameters(), strict=True)
    yield head.lm_head.weight, whole.lm_head.weight


def test_the_layers_end_to_end_are_the_whole_model(config):
    layers, whole = built(config), GPT2LMHeadModel(config)
    assert sum(mine.numel() for mine, _ in pairs(layers, whole)) == sum(p.numel() for p in whole.parameters())
    with torch.no_grad():
        for mine, theirs in pairs(layers, whole):
            mine.copy_(theirs)
    tokens = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    hidden = tokens[:, :-1]
    for layer in layers:
        hidden = layer(hidden)
    theirs = whole(tokens[:, :-1]).logits
    torch.testing.assert_close(hidden, theirs, rtol=1e-4, atol=1e-5)

    loss = next_token_loss(hidden, tokens[:, 1:])
    expected = torch.nn.functional.cross_entropy(theirs.transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, other in pairs(layers, whole):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_a_token_sees_none_that_come_later(config):
    layers = built(config)
    tokens = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    outputs = []
    for hidden in (tokens, changed):
        for layer in layers:
            hidden = layer(hidden)
        outputs.append(hidden)
    assert torch.equal(outputs[0][:, :10], outputs[1][:, :10])
    assert not torch.equal(outputs[0][:, 10], outputs[1][:, 10])


def test_the_head_is_untied_and_weights_start_as_hugging_face_starts_them(config):
    layers, whole = built(config), GPT2LMHeadModel(config)
    assert whole.lm_head.weight is not whole.transformer.wte.weight
    for mine, theirs in pairs(layers, whole):
        if mine.numel() >= 1000:
            assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
        else:
            assert torch.equal(mine, theirs), "biases and norms start as constants"


def test_a_config_comes_from_a_name_or_a_file(tmp_path, config):
    medium = gpt2_config("medium", vocabulary=50257, sequence_length=1024)
    assert (medium.n_layer, medium.n_embd, medium.n_head) == (24, 1024, 16)
    config.to_json_file(tmp_path / "mine.json")
    mine = gpt2_config(str(tmp_path / "mine.json"), vocabulary=VOCABULARY, sequence_length=7, dropout=0.25)
    assert (mine.n_layer, mine.n_embd, mine.n_positions) == (3, SIZES["tiny"]["n_embd"], 7)
    assert mine.resid_pdrop == mine.embd_pdrop == mine.attn_pdrop == 0.25
    with pytest.raises(LaunchError, match="model 'mediun': must be one of tiny, small, medium"):
        gpt2_config("mediun", vocabulary=VOCABULARY, sequence_length=7)


def test_training_guards_against_a_stale_build_lock_before_anything_is_built(monkeypatch, capsys):
    """PyTorch's wait for the lock of a build is replaced before the first kernel is asked for."""
    monkeypatch.setattr(FileBaton, "wait", waits_for_ever := object())
    monkeypatch.setenv("RANK", "0")
    seen = []

    def take_device():
        seen.append(FileBaton.wait)
        raise LaunchError("far enough")

    monkeypatch.setattr(train_gpt, "take_device", take_device)
    with pytest.raises(SystemExit):
        train_gpt.main(["--output", "runs"])
    assert "far enough" in capsys.readouterr().err
    assert len(seen) == 1
    assert seen[0] is not waits_for_ever
