"""Small random models and tokenizers of every make, saved as the hub has them."""

from pathlib import Path

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from arctrm.config import CouplingConfig, HubConfig, TrunkConfig
from arctrm.model.hybrid import HybridModel, HybridRefiner
from arctrm.model.trunk import Trunk
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.solve.weights import Solver, Voices

CORPUS = [
    "input 123 456 1234 2024 1999 10 11 12 100 000 111 output 00 22 33",
    "the rule of the grid is to turn it; input\n012\n345\noutput\n777\n",
    "predicted 123 true 123; 0 1 2 3 4 5 6 7 8 9 row column cell wrong {'a': [1, 2]}",
] * 20
START, END = "<|start|>", "<|end|>"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WIDTH = 32
SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # lively enough that a wrong mask or position shows
}
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma2": (transformers.Gemma2Config, {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "sliding_window": None}),
}


def byte_level(split_digits: bool = False) -> Tokenizer:
    """As Llama 3 (digits merge) or Qwen (each digit on its own)."""
    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), letters])
        if split_digits
        else letters
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentence_piece(digits: bool = True, merges: bool = False) -> Tokenizer:
    """As Llama 2, Mistral and Gemma: a mark for the space, bytes for what is not in it."""
    pieces = ["<unk>", START, END, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "i", "n", "p", "u", "t", "o", "in", "pu", "put"]
    joins = [("i", "n"), ("p", "u"), ("pu", "t")]
    if digits:
        pieces += list("0123456789")
    if merges:
        pieces += ["12", "123"]
        joins += [("1", "2"), ("12", "3")]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, joins, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def words(*vocabulary: str) -> Tokenizer:
    """Whole words only."""
    ids = {word: index for index, word in enumerate(["<unk>", START, END, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def marked_words(*vocabulary: str) -> Tokenizer:
    """Whole words that have the mark of the space before them."""
    tokenizer = words(*("▁" + word for word in vocabulary), "\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = {
    "byte-level, digits merge": byte_level,
    "byte-level, single digits": lambda: byte_level(split_digits=True),
    "sentence pieces": sentence_piece,
    "sentence pieces, digits merge": lambda: sentence_piece(merges=True),
    "sentence pieces, digits are bytes": lambda: sentence_piece(digits=False),
    "words": lambda: words(*"0123456789", "input", "output", ";"),
    "words with the space": lambda: marked_words(*"0123456789", "input", "output"),
}


def wrapped(
    tokenizer: Tokenizer, start: bool = True, chat: bool = False
) -> PreTrainedTokenizerFast:
    """As transformers has it; `start`: a start token comes before every text."""
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
        )
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START if start else None,
        eos_token=END,
        unk_token="<unk>" if tokenizer.token_to_id("<unk>") is not None else None,
    )
    wrapper.chat_template = CHAT if chat else None
    return wrapper


def save_model(
    folder: Path,
    architecture: str = "llama",
    tokenizer: str = "byte-level, digits merge",
    chat: bool = False,
    **changes: object,
) -> Path:
    """A random model and its tokenizer in a folder."""
    made = wrapped(TOKENIZERS[tokenizer](), chat=chat)
    config_class, own = ARCHITECTURES[architecture]
    config: AutoConfig = config_class(
        **{
            **SMALL,
            **own,
            "vocab_size": len(made),
            "bos_token_id": made.bos_token_id,
            "eos_token_id": made.eos_token_id,
            "pad_token_id": None,
            **changes,
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def hub_solver(folder, mode="frozen", back=True) -> Solver:
    """A lively hub model with TRM, which knows no task."""
    torch.manual_seed(0)
    reader = load_hub_reader(HubConfig(name=str(folder), mode=mode, lora_rank=2))
    trunk = Trunk(TrunkConfig(hidden_size=16, num_layers=1, loops=2, num_heads=2), 1)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.normal_(std=0.3)
    coupling = CouplingConfig(back=back, num_context_slots=4, num_back_vectors=3, adapter_heads=2)
    hybrid = HybridModel(reader, trunk, coupling).eval().requires_grad_(False)
    speak = lambda m: Voices(m.reader, HybridRefiner(m, 2), HybridRefiner(m, 2, coupled=False))
    return Solver(speak(hybrid), hybrid, speak, {}, True, 0, "a hub model", reads_pairs=True)
