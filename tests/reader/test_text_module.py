"""Latents and new text: what plain transformers gives, alone and in batches, with gradient."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arctrm.config import HubConfig
from arctrm.errors import ConfigError
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.text_module import LatentOutput, TextReasoningModule
from hub_models import WIDTH, save_model

TEXTS = [
    "input\n012\n345\noutput\n",
    "the rule of the grid is to turn it; input\n012\n345\noutput\n777\n" * 2,
    "0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of models, made once each: `folder(architecture)`."""
    made = {}

    def get(architecture="llama"):
        if architecture not in made:
            made[architecture] = save_model(tmp_path_factory.mktemp("model"), architecture)
        return made[architecture]

    return get


def plain(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def near(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def expected_latent(path, text, max_length, prefix=None):
    """transformers' own greedy generation, then its own forward over everything."""
    model, tokenizer = plain(path)
    ids = tokenizer(text, return_tensors="pt").input_ids
    embedded = model.get_input_embeddings()(ids)
    if prefix is not None:
        embedded = torch.cat([embedded, prefix[None]], 1)
    new = ids[:, :0]
    if max_length:
        new = model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2]),
            do_sample=False,
            max_new_tokens=max_length,
            pad_token_id=0,
        )
    ended = (new[0] == tokenizer.eos_token_id).nonzero()
    new = new[:, : ended[0] if len(ended) else None]
    whole = torch.cat([embedded, model.get_input_embeddings()(new)], 1)
    hidden = model(inputs_embeds=whole, output_hidden_states=True).hidden_states[-1]
    return hidden[0, -1], tokenizer.decode(new[0], skip_special_tokens=True), new.shape[1]


@pytest.mark.parametrize(("with_prefix", "max_length"), [(False, 12), (True, 0), (True, 12)])
def test_latent_and_text_are_those_of_plain_llama(max_length, with_prefix, folder):
    prefix = torch.randn(3, WIDTH) if with_prefix else None
    module = TextReasoningModule(str(folder()), device="cpu")
    for text in TEXTS:
        z_init, written = module.generate_latent(text, prefix, max_length)
        expected, expected_text, _ = expected_latent(folder(), text, max_length, prefix)
        near(z_init, expected)
        assert written == expected_text


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_batch_of_one_equals_a_batch_of_many(architecture, folder):
    module = TextReasoningModule(str(folder(architecture)))
    prefix = torch.randn(3, 2, WIDTH)
    many = module.generate_latent(TEXTS, prefix, 8)
    for row, text in enumerate(TEXTS):
        one = module.generate_latent(text, prefix[row], 8)
        near(many.z_init[row], one.z_init)
        assert (many.text[row], many.new_tokens[row]) == (one.text, one.new_tokens)
        assert many.prompt_tokens[row] == one.prompt_tokens


def ending_model(tmp_path):
    """A model whose greedy text ends by itself after some tokens, not at once."""
    for seed in range(20):
        path = save_model(tmp_path / str(seed))
        model, tokenizer = plain(path)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id].normal_(0, 0.5)
        model.save_pretrained(path)
        counts = [expected_latent(path, text, 20)[2] for text in TEXTS]
        if len(set(counts)) > 1 and 0 < max(counts) < 20:
            return path, counts
    raise AssertionError("no seed gives texts that end")


def test_texts_end_where_they_end_each_on_its_own(tmp_path):
    path, counts = ending_model(tmp_path)
    module = TextReasoningModule(str(path))
    out = module.generate_latent(TEXTS, max_length=20)
    assert out.new_tokens == counts
    for row, text in enumerate(TEXTS):
        expected, expected_text, _ = expected_latent(path, text, 20)
        near(out.z_init[row], expected)
        assert out.text[row] == expected_text
        assert "<|" not in expected_text


def test_a_prefix_may_be_one_vector_several_or_several_per_text(folder):
    module = TextReasoningModule(str(folder()))
    vector = torch.randn(WIDTH)
    shapes = [vector, vector[None], vector[None, None], vector.expand(2, 1, WIDTH)]
    outs = [module.generate_latent(TEXTS[:2], prefix, 4) for prefix in shapes]
    assert isinstance(outs[0], LatentOutput)
    assert (outs[0].z_init.shape, len(outs[0].text)) == ((2, module.hidden_size), 2)
    for out in outs:
        near(out.z_init, outs[0].z_init)
        assert out.prefix_tokens == 1
    assert not torch.allclose(module.generate_latent(TEXTS[:2], None, 4).z_init, outs[0].z_init)
    assert module.generate_latent(TEXTS[0], torch.randn(5, WIDTH), 0).prefix_tokens == 5


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((WIDTH + 1,), r"latent_prefix has the shape \[33\], allowed .* D = 32, the width"),
        ((), r"latent_prefix has the shape \[\]"),
        ((3, 2, WIDTH), r"latent_prefix has the shape \[3, 2, 32\], .* B = 2 texts"),
    ],
)
def test_a_prefix_of_another_shape_is_refused(shape, said, folder):
    with pytest.raises(ConfigError, match=said):
        TextReasoningModule(str(folder())).generate_latent(TEXTS[:2], torch.zeros(shape))


def test_problems_that_cannot_be_read_are_refused(folder):
    module = TextReasoningModule(str(folder()))
    with pytest.raises(ConfigError, match="more than the 1024 that the model holds; shorten"):
        module.generate_latent("0" * 2000)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_gradients_reach_the_trained_weights_and_the_prefix(mode, folder):
    freeze = mode == "frozen"
    module = TextReasoningModule(str(folder()), freeze, mode=mode, gradient_checkpointing=freeze)
    module.train()
    prefix = torch.randn(2, WIDTH, requires_grad=True)
    module.generate_latent(TEXTS, prefix, 5).z_init.square().sum().backward()
    assert prefix.grad.norm() > 0
    trained = dict(module.named_parameters())
    assert bool(trained) == (not freeze)
    reached = [name for name, p in trained.items() if p.grad is not None and p.grad.any()]
    assert freeze or any("layers.0" in name for name in reached)
    plain = module.generate_latent(TEXTS, max_length=2).z_init
    assert plain.requires_grad == (not freeze)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_loaded_reader_can_be_given_and_stays_as_trained_as_it_is(freeze, folder):
    reader = load_hub_reader(HubConfig(name=str(folder()), mode="full"))
    module = TextReasoningModule(reader, freeze)
    assert len(list(module.parameters())) == len(list(reader.parameters())) > 0
    assert all(p.requires_grad for p in reader.parameters())
    assert module.generate_latent(TEXTS[0], max_length=1).z_init.requires_grad
    with pytest.raises(ConfigError, match="takes no device and no options"):
        TextReasoningModule(reader, dtype="float32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze": True, "mode": "lora"}, "freeze = True contradicts mode = 'lora'"),
        ({"rank": 3}, "TextReasoningModule: unknown key rank"),
        ({"lora_rank": 0}, "TextReasoningModule: lora_rank = 0 should be greater than"),
        ({"device_map": "auto", "device": "cpu"}, "hub.device = 'cpu' contradicts hub.device_map"),
    ],
)
def test_wrong_options_are_one_sentence(options, said):
    with pytest.raises(ConfigError) as error:
        TextReasoningModule("some/model", **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
