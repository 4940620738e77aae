"""A real, tiny, random language model behind `generate_latent`, over the bytes of its text."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN = 16


class Output:
    """Unpacks as (z_init, texts)."""

    def __init__(self, z_init, texts, new_tokens):
        self.z_init, self.texts, self.new_tokens = z_init, texts, new_tokens

    def __iter__(self):
        return iter((self.z_init, self.texts))


class ByteReader:
    """Reads bytes after a soft prefix, and writes a few letters greedily; remembers its calls."""

    def __init__(self):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        self.model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for p in self.model.parameters():
                p.normal_(std=0.5)
        self.prompts, self.prefixes, self.max_lengths = [], [], []

    @torch.no_grad()
    def generate_latent(self, problem_text, latent_prefix=None, max_length=128):
        self.prompts.append(list(problem_text))
        self.prefixes.append(latent_prefix)
        self.max_lengths.append(max_length)
        prefixes = [None] * len(problem_text) if latent_prefix is None else latent_prefix
        read = [self._one(t, p, max_length) for t, p in zip(problem_text, prefixes, strict=True)]
        z_init = torch.stack([z for z, _ in read])
        texts = [text for _, text in read]
        return Output(z_init, texts, [len(t) for t in texts])

    def _one(self, text, prefix, max_length):
        embed, new = self.model.get_input_embeddings(), ""
        start = torch.zeros(0, HIDDEN) if prefix is None else prefix
        for _ in range(min(4, max_length)):
            ids = torch.tensor([min(127, ord(c)) for c in text + new])
            x = torch.cat((start, embed(ids)))[None]
            out = self.model(inputs_embeds=x, output_hidden_states=True)
            new += chr(97 + int(out.logits[0, -1, 97:123].argmax()))
        return out.hidden_states[-1][0, -1], new


@pytest.fixture
def make_reader():
    return ByteReader


@pytest.fixture
def reader():
    return ByteReader()
