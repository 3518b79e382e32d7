"""Networks of Hugging Face's transformers as they are, of random weights: what of them is on crossbars, that their answers stay, padding,
caches of keys and values in generation, and metrics."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as tree

from models.quant import Calibration, CrossbarSpec, Setting, convert, crossbar_layers, load, measure, measure_float, perplexity, save
from models.quant.layers.batches import first_tensor

transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = CrossbarSpec(8, 8, adc_range="ideal")
VOCABULARY, WIDTH, HEADS, TOKENS, ANSWERS = 64, 48, 4, 12, 8
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=80, initializer_range=0.2,
             max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=2, num_labels=5, **SIZES))


def albert():
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(num_hidden_layers=3, embedding_size=16, **SIZES))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=HEADS, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **SIZES))


def t5_config():
    return transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=80, num_layers=2, num_heads=HEADS,
                                 decoder_start_token_id=0, eos_token_id=2)


def t5():
    return transformers.T5ForConditionalGeneration(t5_config())


def t5_encoder():
    return transformers.T5EncoderModel(t5_config())


def whisper_encoder():
    return transformers.WhisperModel(transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=WIDTH, encoder_layers=2, decoder_layers=1, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=80, decoder_ffn_dim=80, max_source_positions=20, init_std=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)).encoder


NETWORKS = {make.__name__: make for make in (bert, albert, gpt2, llama, t5, t5_encoder, whisper_encoder)}
# Attentions of one example: queries times keys, for the scores and again for what they weigh.
ATTENTIONS = {"bert": 2 * TOKENS**2, "albert": 3 * TOKENS**2, "gpt2": 2 * TOKENS**2, "llama": 2 * TOKENS**2,
              "t5": 2 * (TOKENS**2 + ANSWERS**2 + ANSWERS * TOKENS), "t5_encoder": 2 * TOKENS**2, "whisper_encoder": 2 * 20**2}
IMPLEMENTATIONS = ("eager", "sdpa")


@functools.cache
def model_of(name):
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def batch_of(name, seed, count=12, tokens=TOKENS):
    """Sentences of several lengths, padded; or sounds."""
    generator = torch.Generator().manual_seed(seed)
    if name == "whisper_encoder":
        return {"input_features": torch.randn(count, 16, 40, generator=generator)}
    batch = {"input_ids": torch.randint(3, VOCABULARY, (count, tokens), generator=generator),
             "attention_mask": (torch.arange(tokens) < torch.randint(4, tokens + 1, (count, 1), generator=generator)).long()}
    if name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (count, ANSWERS), generator=generator)
    return batch


@functools.cache
def converted(name):
    """W8A8, of two batches."""
    return convert(model_of(name), SPEC, [batch_of(name, 0), batch_of(name, 1)])


def answers(net, batch):
    with torch.no_grad():
        return net(**batch)


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


# ---- what is mapped, and that it answers as before ---------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_bound_networks_answer_as_before(name, implementation):
    model = copy.deepcopy(model_of(name))
    model.set_attn_implementation(implementation)
    net = convert(model, None, [batch_of(name, 0)])
    found, wanted = ([leaf for leaf in tree.tree_leaves(answers(each, batch_of(name, 2, tokens=9))) if isinstance(leaf, torch.Tensor)]
                     for each in (net, model))
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # of sums in another order


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_answers_of_w8a8(name, implementation):
    both = []
    for net in (converted(name), model_of(name)):
        net.set_attn_implementation(implementation)
        both.append(first_tensor(answers(net, batch_of(name, 2, tokens=9))))
        net.set_attn_implementation("sdpa")
    assert 0.995 <= cosine(*both) < 0.99999999 and both[1].std(0).mean() > 0.1  # examples have answers of their own
    centred = [each - each.mean(0) for each in both]
    assert cosine(*centred) >= 0.995


@pytest.mark.parametrize("name", NETWORKS)
def test_all_weights_but_embeddings_are_on_crossbars(name):
    """Against a list of modules by their kinds."""
    model, report = model_of(name), converted(name).crossbar_report
    kinds = {id(module.weight): kind for kind in (nn.Embedding, (nn.Linear, nn.Conv1d, Conv1D)) for module in model.modules()
             if isinstance(module, kind)}  # of a weight that is both, the second
    products = {place.removesuffix(".weight") for place, weight in model.named_parameters()
                if id(weight) in kinds and kinds[id(weight)] is not nn.Embedding}
    assert {layer["name"] for layer in report.layers} == products
    assert {f"{place}.crossbar" for place in products} == {place for place, _ in crossbar_layers(converted(name))}
    looked_up = [place for place, weight in model.named_parameters() if kinds.get(id(weight)) is nn.Embedding]
    assert report.unused == looked_up and report.digital == {} and report.digital_multiplications == 0
    assert report.between == 12 * 2 * WIDTH * ATTENTIONS[name]
    text = str(report)
    assert f"digital: {2 * WIDTH * ATTENTIONS[name]:,} multiplications of two activations an example" in text
    assert not looked_up or f"not used): {looked_up[0]}" in text


def test_shared_layers_are_one_set_of_cells():
    by_name = {layer["name"]: layer for layer in converted("albert").crossbar_report.layers}
    shared = by_name["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"]
    assert len(by_name) == 9 and shared["weights"] == 80 * WIDTH
    assert shared["multiplications"] == 3 * 12 * TOKENS * shared["weights"]  # three layers of 12 sentences


@pytest.mark.parametrize("name, scale", [("gpt2", 1), ("t5", WIDTH**-0.5)])
def test_a_tied_embedding_is_looked_up_as_it_is_and_multiplied_on_crossbars(name, scale):
    model, net = model_of(name), converted(name)
    embedding, own = net.get_input_embeddings(), model.get_input_embeddings()
    assert torch.equal(embedding(torch.arange(VOCABULARY)), own(torch.arange(VOCABULARY)))
    hidden = scale * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))
    seen = []
    hook = embedding.crossbar.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        found, wanted = net.lm_head(hidden), model.lm_head(hidden)
    hook.remove()
    assert seen == [1] and 0 < (found - wanted).abs().max() < 0.2 * wanted.std()


def test_a_network_is_saved_and_loaded(tmp_path):
    save(converted("llama"), tmp_path / "net.pt")
    again = load(tmp_path / "net.pt", model_of("llama"))
    assert torch.equal(answers(again, batch_of("llama", 2)).logits, answers(converted("llama"), batch_of("llama", 2)).logits)


# ---- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "albert", "llama", "t5", "t5_encoder"])
def test_padding_decides_nothing(name):
    """Alone and padded a sentence has the same codes, but for those that float32 rounds otherwise; without the mask it has not."""
    net, batch = converted(name), batch_of(name, 4, count=4)
    masked, unmasked = (first_tensor(answers(net, each)) for each in (batch, {**batch, "attention_mask": None}))
    for number, size in enumerate(batch["attention_mask"].sum(1).tolist()):
        own = {key: value[number:number + 1] if key == "decoder_input_ids" else value[number:number + 1, :size]
               for key, value in batch.items()}
        alone = first_tensor(answers(net, own))[0]
        part = slice(None) if name in ("bert", "t5") else slice(size)
        assert cosine(masked[number][part], alone) > 0.9999
        if size < TOKENS and name != "llama":  # which looks back alone
            assert cosine(unmasked[number][part], alone) < 0.999


# ---- generation --------------------------------------------------------------------------------------------------------


def greedy(net, batch, count):
    """The most likely tokens, one after the other, each by a pass of all that came before."""
    name = "decoder_input_ids" if net.config.is_encoder_decoder else "input_ids"
    tokens = batch["input_ids"] if name == "input_ids" else torch.zeros(len(batch["input_ids"]), 1, dtype=torch.int64)
    for _ in range(count):
        scores = answers(net, {**batch, name: tokens, "use_cache": False}).logits[:, -1]
        tokens = torch.cat([tokens, scores.argmax(1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_with_and_without_a_cache(name):
    net, prompts = converted(name), {"input_ids": batch_of(name, 5, count=6, tokens=7)["input_ids"]}
    options = dict(max_new_tokens=10, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(6, 7, dtype=torch.int64))
    cached, whole = (net.generate(**prompts, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole) and torch.equal(cached, greedy(net, prompts, 10))
    assert len({tuple(row.tolist()) for row in cached[:, -10:]}) > 1  # of several prompts several
    sampled = []
    for use in (True, False):
        torch.manual_seed(0)
        sampled.append(net.generate(**prompts, **options, use_cache=use, do_sample=True, top_k=20))
    assert torch.equal(*sampled) and not torch.equal(sampled[0], cached)
    beams = [net.generate(**prompts, **options, use_cache=use, num_beams=3) for use in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_of_padded_prompts(name):
    """Padding on the left is as if it were not there."""
    net, batch = converted(name), batch_of(name, 6, count=4)
    options, sizes = dict(max_new_tokens=6, eos_token_id=None, pad_token_id=0), batch["attention_mask"].sum(1).tolist()
    rows = [batch["input_ids"][number:number + 1, :size] for number, size in enumerate(sizes)]
    padded, mask = (torch.cat([F.pad(part, (TOKENS - part.shape[1], 0)) for part in parts])
                    for parts in (rows, [torch.ones_like(row) for row in rows]))
    found = net.generate(input_ids=padded, attention_mask=mask, **options)
    for row, together in zip(rows, found):
        alone = net.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(alone[0, -6:], together[-6:])


# ---- metrics -----------------------------------------------------------------------------------------------------------


def with_labels(name, seed):
    batch = batch_of(name, seed, count=8)
    if name == "t5":
        return {**batch, "labels": batch["decoder_input_ids"].roll(-1, 1).masked_fill(torch.arange(ANSWERS) == ANSWERS - 1, -100)}
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def own_perplexity(net, batches):
    """By the loss that the network itself computes of its labels."""
    nats, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"] if net.config.is_encoder_decoder else batch["labels"][:, 1:]  # which has no output before the first
        size = int((labels != -100).sum())
        nats, count = nats + answers(net, batch).loss.item() * size, count + size
    return math.exp(nats / count)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_perplexity(name):
    data = [with_labels(name, 7), with_labels(name, 8)]
    net = copy.deepcopy(converted(name))
    software = measure(net, data, None, None, metric=perplexity)
    assert software.accuracy == pytest.approx(own_perplexity(net, data), rel=1e-6)
    float_one = measure_float(model_of(name), data, None, metric=perplexity)
    assert float_one.accuracy == pytest.approx(own_perplexity(model_of(name), data), rel=1e-6)
    assert software.accuracy == pytest.approx(float_one.accuracy, rel=0.02) and software.accuracy != float_one.accuracy
    setting = Setting(CrossbarSpec(8, 8, adc_bits=6, cell_bits=2), calibration=Calibration(correct="channel"))
    record = measure(net, data, None, setting, calibration=[with_labels(name, 0)], metric=perplexity, software=software)
    assert record.accuracy == pytest.approx(own_perplexity(net, data), rel=1e-6) and record.accuracy != software.accuracy
    assert record.n_images == 16 and record.chance > 0 and record.predictions is None


def test_labels_that_the_network_takes_too():
    """T5 makes the inputs of its decoder of them."""
    data = [{"input_ids": batch["input_ids"], "labels": batch["labels"]} for batch in (with_labels("t5", 7), with_labels("t5", 8))]

    def both(batch):
        return batch, batch["labels"]

    net = convert(model_of("t5"), None, data, take=both)
    found = measure(net, data, None, None, metric=perplexity, take=both)
    assert found.accuracy == pytest.approx(own_perplexity(model_of("t5"), data), rel=1e-5)
    with pytest.raises(ValueError, match="^the network does not run on the images, of shape .*: You must specify exactly one of input_ids"):
        convert(model_of("t5"), None, data)


def test_classes_with_labels_in_the_batches():
    """Half of the labels are the float network's own answers."""
    batches = [batch_of("bert", seed, count=20) for seed in (9, 10)]
    own = [answers(model_of("bert"), batch).logits.argmax(1) for batch in batches]
    data = [{**batch, "labels": torch.where(torch.arange(20) % 2 == 0, each, (each + 1) % 5)} for batch, each in zip(batches, own)]
    record = measure(converted("bert"), data, None, None)
    wanted = torch.cat([answers(converted("bert"), batch).logits.argmax(1) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in data])
    assert torch.equal(record.predictions, wanted)
    assert record.accuracy == 100 * (wanted == labels).double().mean().item() and 40 <= record.accuracy <= 60
