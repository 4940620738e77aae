"""Hub readers: every architecture loads and computes what transformers computes, trained or not."""

import json
import shutil

import numpy as np
import pytest
import torch
from hub_models import ARCHITECTURES, TOKENIZERS, WIDTH, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from arctrm.config.reader_hub import HubReaderConfig
from arctrm.data.task import Pair, Task
from arctrm.errors import CheckpointError, ConfigError
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.interface import left_padded
from arctrm.reader.prompts import spell_grid, task_prompt

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def random_grid(height, width):
    return RNG.integers(0, 10, (height, width)).astype(np.uint8)


TASKS = [
    Task(
        f"task{n}",
        tuple(Pair(random_grid(n, n + 1), random_grid(2, n)) for _ in range(n)),
        (Pair(random_grid(3, n)),),
    )
    for n in (1, 3, 2)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of models, made once each: `folder(architecture)`."""
    made = {}

    def get(architecture="llama", **options):
        key = (architecture, *options.items())
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("model"), architecture, **options)
        return made[key]

    return get


def load(path, **options):
    return load_hub_reader(HubReaderConfig(name=str(path), **options), CPU)


def plain_logits(path, tokens):
    """transformers' own forward pass over one prompt, alone and without a cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0]


def prompts_of(reader):
    return [task_prompt(reader, task, 0, 1000).prompt for task in TASKS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_logits_of_padded_prompts_are_those_of_each_prompt_alone(architecture, folder):
    path = folder(architecture)
    reader = load(path)
    prompts = prompts_of(reader)
    answer = [random_grid(2, 3) for _ in prompts]
    spelt = torch.tensor(np.stack([spell_grid(reader.grid_tokens, grid) for grid in answer]))
    tokens, positions, mask = left_padded(prompts)
    assert tokens.shape[1] > 32  # beyond the sliding windows
    condition = torch.zeros(len(prompts), 3, dtype=torch.long)
    cache = reader.new_cache(tokens.shape[1] + spelt.shape[1] + 3)
    with torch.no_grad():
        got = [reader.logits(tokens, positions, condition, mask, cache, keep=1)]
        start = torch.tensor([prompt.output_start for prompt in prompts])
        for count in range(spelt.shape[1]):
            place = reader.output_positions(start, count, start, start)[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            fed = spelt[:, count : count + 1]
            got.append(reader.logits(fed, place, condition, mask, cache))
    got = torch.cat(got, 1)
    for row, prompt in enumerate(prompts):
        whole = plain_logits(path, np.concatenate([prompt.tokens, spelt[row].numpy()]))
        expected = whole[len(prompt.tokens) - 1 :]
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_on_hidden_states_gives_the_logits_of_the_model(architecture, folder):
    path = folder(architecture)
    reader = load(path)
    prompt = prompts_of(reader)[1]
    tokens, mask = torch.tensor(prompt.tokens)[None], torch.ones(1, len(prompt.tokens)).long()
    hidden, _ = reader.encode(tokens, mask)
    assert hidden.shape == (1, len(prompt.tokens), reader.hidden_size)
    assert hidden.dtype == torch.float32
    with torch.no_grad():
        logits = reader.head(hidden)
        again = reader.run(tokens, torch.tensor(prompt.positions)[None], mask)  # all as before
    torch.testing.assert_close(logits[0], plain_logits(path, prompt.tokens), atol=1e-5, rtol=1e-5)
    assert torch.equal(again, hidden)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_after_cached_text_is_read_as_without_the_cache(architecture, folder):
    reader = load(folder(architecture))
    tokens, positions, mask = left_padded(prompts_of(reader))
    prefix = torch.randn(len(tokens), 4, WIDTH)
    with torch.no_grad():
        hidden, whole_mask = reader.encode(tokens, mask, prefix)
        cache = reader.new_cache(tokens.shape[1] + 4)
        text = reader.run(tokens, positions, mask, cache)
        after = reader.positions_after(mask.sum(1), tokens[:, :0], 4)
        tail = reader.run(prefix, after, whole_mask, cache)
    seen = mask.bool()
    torch.testing.assert_close(text[seen], hidden[:, :-4][seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail, hidden[:, -4:], atol=1e-5, rtol=1e-5)
    assert whole_mask.tolist() == [[*row, 1, 1, 1, 1] for row in mask.tolist()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_one_is_encoded_as_in_a_batch_of_many(architecture, folder):
    reader = load(folder(architecture))
    prompts = prompts_of(reader)
    tokens, _, mask = left_padded(prompts)
    hidden, _ = reader.encode(tokens, mask)
    for row, prompt in enumerate(prompts):
        alone = torch.tensor(prompt.tokens)[None]
        expected, _ = reader.encode(alone, torch.ones_like(alone))
        torch.testing.assert_close(
            hidden[row, -len(prompt.tokens) :], expected[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_tokenizer_is_loaded_as_it_was_saved(tokenizer, tmp_path):
    reader = load(save_model(tmp_path, tokenizer=tokenizer))
    tokens = reader.grid_tokens
    assert len({*tokens.colours, tokens.row_end, tokens.end}) == 12
    assert [reader.text_of([t]).strip() for t in tokens.colours] == list("0123456789")
    assert reader.stop_tokens == (reader.tokenizer.eos_token_id,)
    prompt = reader.text_prompt("input 1 2")
    assert prompt.tokens[0] == reader.tokenizer.bos_token_id
    assert prompt.output_start == len(prompt.tokens)


def test_a_prompt_leaves_room_for_the_largest_grid_unless_bounded(folder):
    assert load(folder()).max_prompt_tokens == 1024 // 2  # 931 tokens would leave almost nothing
    assert load(folder(max_position_embeddings=4096)).max_prompt_tokens == 4096 - 931
    assert load(folder(), max_tokens=100).max_prompt_tokens == 100


def test_a_frozen_reader_has_nothing_to_train_and_stays_in_evaluation_mode(folder):
    reader = load(folder())
    assert reader.trainable_parameters() == {}
    reader.train()
    assert not reader.model.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_gradients_reach_the_prefix_and_what_is_trained(mode, checkpointing, folder):
    reader = load(folder(), mode=mode, gradient_checkpointing=checkpointing)
    tokens, _, mask = left_padded(prompts_of(reader))
    prefix = torch.randn(len(tokens), 2, WIDTH, requires_grad=True)
    reader.train()
    for name, parameter in reader.trainable_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero at first, which keeps gradient from lora_A
    hidden, _ = reader.encode(tokens, mask, prefix)
    reader.head(hidden[:, -1]).logsumexp(-1).sum().backward()
    assert prefix.grad.norm() > 0
    trained = reader.trainable_parameters()
    assert bool(trained) == (mode != "frozen")
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained.values())
    assert all(("lora_" in name) == (mode == "lora") for name in trained)


def test_checkpointing_changes_no_gradient_and_no_cached_logits(folder):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        reader = load(folder(), mode="full", gradient_checkpointing=checkpointing)
        reader.train()
        tokens, positions, mask = left_padded(prompts_of(reader))
        hidden, _ = reader.encode(tokens, mask)
        hidden.square().sum().backward()
        cache = reader.new_cache(tokens.shape[1])
        logits = reader.logits(tokens, positions, torch.zeros(3, 3).long(), mask, cache)
        assert reader.model.training
        results.append((reader.trainable_parameters(), logits))
    (plain, logits), (checkpointed, same) = results
    assert torch.equal(logits, same)
    for name, parameter in plain.items():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, checkpointed[name].grad), name


def test_lora_starts_at_the_model_and_its_state_goes_over_to_another(folder, tmp_path):
    frozen, trained, fresh = (load(folder(), mode=mode) for mode in ("frozen", "lora", "lora"))
    tokens, _, mask = left_padded(prompts_of(frozen))
    before = frozen.encode(tokens, mask)[0]
    assert torch.equal(trained.encode(tokens, mask)[0], before)
    with torch.no_grad():
        for parameter in trained.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    after = trained.encode(tokens, mask)[0]
    assert not torch.allclose(after, before)
    fresh.load_trainable_state(trained.trainable_state(), tmp_path)
    assert torch.equal(fresh.encode(tokens, mask)[0], after)


def test_trained_state_of_another_shape_is_refused(folder, tmp_path):
    state = load(folder(), mode="lora").trainable_state()
    with pytest.raises(CheckpointError, match=r"tensors missing|unexpected"):
        load(folder(), mode="full").load_trainable_state(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"has shape \(16, 32\), the reader .* \(4, 32\)"):
        load(folder(), mode="lora", lora_rank=4).load_trainable_state(state, tmp_path)


def test_lora_targets_are_the_layers_named_and_wrong_names_are_refused(folder):
    reader = load(folder(), mode="lora", lora_targets=("q_proj", "v_proj"))
    assert len(reader.trainable_parameters()) == 2 * 2 * 2
    assert not any("lm_head" in name for name in load(folder(), mode="lora").trainable_parameters())
    with pytest.raises(ConfigError, match=r"hub.lora_targets = \['query'\] .* q_proj"):
        load(folder(), mode="lora", lora_targets=("query",))


def test_lora_matrices_are_float32_whatever_the_weights_are(folder):
    reader = load(folder(), mode="lora", dtype="bfloat16")
    assert reader.model.dtype == torch.bfloat16
    assert {p.dtype for p in reader.trainable_parameters().values()} == {torch.float32}
    tokens, _, mask = left_padded(prompts_of(reader))
    hidden, _ = reader.encode(tokens, mask)
    assert hidden.dtype == reader.head(hidden[:, -1]).dtype == torch.float32


def test_lora_without_peft_is_one_sentence_naming_the_extra(folder, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name)
    )
    with pytest.raises(ConfigError, match=r"needs the package peft.*pip install 'arctrm\[peft\]'"):
        load(folder(), mode="lora")


def test_a_device_map_spreads_and_still_answers(folder):
    path = folder()
    reader = load(path, device_map="auto")
    prompt = prompts_of(reader)[0]
    tokens = torch.tensor(prompt.tokens)[None]
    hidden, _ = reader.encode(tokens, torch.ones_like(tokens))
    with torch.no_grad():
        logits = reader.head(hidden)
        assert torch.equal(reader.encode(tokens, torch.ones_like(tokens))[0], hidden)
    torch.testing.assert_close(logits[0], plain_logits(path, prompt.tokens), atol=1e-5, rtol=1e-5)


def test_text_that_the_embeddings_do_not_cover_is_refused(folder):
    reader = load(folder())
    reader.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ConfigError, match=r"the tokenizer gives id \d+, the model has \d+ embed"):
        reader.text_prompt("a zebra")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, "hub.device = 'gpu' is not a device; use 'cpu', 'cuda' or 'cuda:0'"),
        ({"device": "cuda:9"}, "hub.device = 'cuda:9': there are"),
    ],
)
def test_devices_that_are_not_there_are_refused(options, said, folder):
    with pytest.raises(ConfigError) as error:
        load(folder(), **options)
    assert said in str(error.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"is not the folder of a model: it has no config\.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is a file; give the folder of the model"):
        load(folder() / "config.json")
    for name in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no such folder"):
            load(name)


def damaged(folder, tmp_path, **config):
    """A copy of a model with some of config.json changed."""
    copy = shutil.copytree(folder(), tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | config))
    return copy


def test_damaged_folders_are_one_sentence_each(folder, tmp_path):
    path = damaged(folder, tmp_path)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()

    def refused(kind, said):
        with pytest.raises(kind) as error:
            load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    weights.write_bytes(whole[: len(whole) // 2])
    refused(CheckpointError, "its weights cannot be read")
    weights.unlink()
    refused(ConfigError, "has no weights in safetensors files")
    torch.save({}, path / "pytorch_model.bin")
    refused(ConfigError, "has no weights in safetensors files")  # nothing is unpickled
    weights.write_bytes(whole)
    save_file({k: v for k, v in load_file(weights).items() if "norm" not in k}, weights)
    refused(CheckpointError, "the weights do not fit config.json: 5 tensors missing, first")
    weights.write_bytes(whole)
    (path / "tokenizer.json").write_text("{")
    refused(ConfigError, "its tokenizer cannot be read")
    (path / "tokenizer.json").unlink()
    refused(ConfigError, "has no tokenizer that can be read; it needs a tokenizer.json")
    (path / "config.json").write_text("{")
    refused(ConfigError, "its config.json cannot be read")


def test_weights_of_another_size_are_refused_by_name(folder, tmp_path):
    with pytest.raises(CheckpointError) as error:
        load(damaged(folder, tmp_path, intermediate_size=64))
    assert (
        "the weights do not fit config.json: 'model.layers.0.mlp.down_proj.weight' has shape "
        "(32, 48), expected is (32, 64); download or save the model again"
    ) in str(error.value)


def test_models_of_other_kinds_are_refused(folder, tmp_path):
    def refused(name, said, **config):
        path = damaged(folder, tmp_path / name, **config)
        with pytest.raises(ConfigError) as error:
            load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert said in str(error.value)

    refused("t5", "is a model of type t5, not a causal", model_type="t5", architectures=["T5Model"])
    refused(
        "bert", "is a BertForMaskedLM, not", model_type="bert", architectures=["BertForMaskedLM"]
    )
    refused("new", "does not know this kind of model; upgrade", model_type="llama9")
    remote = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    refused("code", "needs Python code that comes with", model_type="own", auto_map=remote)
