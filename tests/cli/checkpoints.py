"""Tiny checkpoints on disk: a random Llama and a word-level tokenizer that fits it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the of a is and to in weight model python one two three . ,".split()
TEXT = "the weight of a model is one , and the python is in two . "
BOS, EOS, UNKNOWN = 0, 1, 2
VOCABULARY = 3 + len(WORDS)


def make_tokenizer(*, adds_bos: bool = True, bos: bool = True, eos: bool = True):
    """Return a word-level tokenizer; by itself it adds ``<s>`` before a text, or nothing."""
    words = ["<s>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
    )


def make_model(**changes) -> LlamaForCausalLM:
    """Return a random Llama of 2 layers, the same each time."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def plant(model: LlamaForCausalLM) -> None:
    """Give layer 1 a super weight at [5, 7]: a large input peak times a large weight."""
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight[7] *= 30
        mlp.gate_proj.weight[7] *= 30
        mlp.down_proj.weight[5, 7] = 10.0


def save(model, folder: Path, tokenizer=None) -> Path:
    """Write a checkpoint with its tokenizer."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, str]:
    """A hash of every file in a folder and below it, to show that they are as before."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
