"""Causal language models of a folder (`experiment/inputs/language.py`): their perplexity against Hugging Face's own recipe, written as a
plain loop, and what is said of folders and texts that are none."""

import csv
import json
import shutil

import pytest
import torch

import eval as evaluation
import train
from experiment.inputs import language
from experiment.program.cli import UserError
from models.quant import CrossbarSpec, Setting, convert, measure, measure_float, perplexity

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = [f"w{number}" for number in range(60)]


def gpt2(**options):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **options))


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, max_position_embeddings=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0))


def written(model, folder):
    """A folder with the model and a tokenizer of whole words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0} | {word: 1 + n for n, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {make.__name__: written(make(), place / make.__name__) for make in (gpt2, llama)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of so many words."""
    def make(count, seed=0):
        numbers = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
        path = tmp_path_factory.mktemp("texts") / f"{count}.txt"
        path.write_text(" ".join(WORDS[number] for number in numbers))
        return str(path)

    return make


def recipe(model, tokens, window, stride):
    """Perplexity as the page "Perplexity of fixed-length models" of transformers' documentation computes it."""
    total, count, reached = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        labels = tokens[begin:end].clone()
        labels[:len(labels) - (end - reached)] = -100
        with torch.no_grad():
            loss = model(tokens[None, begin:end], labels=labels[None]).loss.item()
        weight = int((labels != -100).sum()) - 1
        if weight:  # a window of one token has no loss
            total, count = total + loss * weight, count + weight
        reached = end
        if end == len(tokens):
            break
    return torch.tensor(total / count).exp().item()


def ids(path):
    return torch.tensor([1 + WORDS.index(word) for word in open(path).read().split()])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("words, window, stride", [
    (400, None, None), (413, 32, 8), (401, 20, 20), (400, 20, 20), (20, 20, 20), (405, 20, 13), (409, 31, 29), (35, 32, 1)])
def test_perplexity_is_that_of_the_recipe(folders, texts, name, words, window, stride):
    text = texts(words)
    found = language.task(folders[name], text, window, stride, batch_size=3, calibration_windows=0)
    wanted = recipe(found.network, ids(text), window or 32, stride or 16)
    record = measure_float(found.network, found.data, None, metric=found.metric, take=found.take)
    assert record.accuracy == pytest.approx(wanted, rel=1e-5) and 20 < wanted < 1e4
    assert record.metric == perplexity.scale and found.kind == "windows of text"


def test_at_a_stride_of_a_token_less_each_token_counts_alike(folders, texts):
    text = texts(40)
    found = language.task(folders["gpt2"], text, 20, 19, calibration_windows=0)
    tokens, nats = ids(text), []
    with torch.no_grad():
        for begin in (0, 19, 38):
            scores = found.network(tokens[None, begin:begin + 20]).logits[0].double().log_softmax(-1)
            nats += [-scores[t, token].item() for t, token in enumerate(tokens[begin + 1:begin + 20])]
    record = measure_float(found.network, found.data, None, metric=found.metric)
    assert len(nats) == 39 and record.accuracy == pytest.approx(torch.tensor(nats).mean().exp().item(), rel=1e-5)


def test_weights_of_16_bits_become_float32(folders, texts, tmp_path):
    network = language.task(written(llama().to(torch.bfloat16), tmp_path / "net"), texts(300)).network
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(network.parameters(), llama().parameters()))


def test_each_token_is_counted_once(folders, texts):
    found = language.task(folders["gpt2"], texts(405), 20, 13, calibration_windows=4)
    assert [list(batch) for batch in found.calibration] == [["input_ids"]]
    assert torch.equal(found.calibration[0]["input_ids"].flatten(), ids(texts(405))[:80])
    rest = ids(texts(405))[80:]
    counted = torch.cat([batch["targets"][batch["targets"] >= 0] for batch in found.data])
    assert torch.equal(counted, rest[1:]) and [len(batch["input_ids"]) for batch in found.data] == [8, 8, 8, 1]
    assert torch.equal(found.data[0]["input_ids"][0], rest[:20])


def test_calibration_has_a_text_of_its_own(folders, texts):
    found = language.task(folders["gpt2"], texts(100), 20, 20, calibration_windows=5, calibration_text=texts(130, seed=1), batch_size=2)
    assert [len(batch["input_ids"]) for batch in found.calibration] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found.calibration]).flatten(), ids(texts(130, seed=1))[:100])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found.data]).flatten(), ids(texts(100)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_on_crossbars(folders, texts, name):
    found = language.task(folders[name], texts(300))
    spec = CrossbarSpec(8, 8, adc_range="ideal")
    net = convert(found.network, spec, found.calibration)
    software = measure_float(found.network, found.data, None, metric=found.metric)
    record = measure(net, found.data, None, Setting(spec), calibration=found.calibration, metric=found.metric)
    assert record.accuracy == pytest.approx(software.accuracy, rel=0.03) and record.accuracy != software.accuracy


@pytest.mark.parametrize("make", [gpt2, llama])
def test_labels_are_those_of_the_models_own_loss(make):
    """Of a class that is made from a model's, too."""
    model = make().eval()
    model.__class__ = type("Mine", (type(model),), {})
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    with torch.no_grad():
        wanted = model(**batch).loss.exp().item()
    assert measure(model, [batch], None, None, metric=perplexity).accuracy == pytest.approx(wanted, rel=1e-5)


# ---- what is said ------------------------------------------------------------------------------------------------------


def without(folder, tmp_path, *patterns):
    """A copy of a folder without some files."""
    shutil.copytree(folder, tmp_path / "copy")
    for pattern in patterns:
        for path in (tmp_path / "copy").glob(pattern):
            path.unlink()
    return str(tmp_path / "copy")


@pytest.mark.parametrize("patterns, message", [
    (["*"], ": the folder has no config.json; give one that save_pretrained"), (["tokenizer.json"], ": the folder has no tokenizer; give"),
    (["*.safetensors"], r": the folder has no weights \(model.safetensors\); give")])
def test_folders_that_lack_something(folders, texts, tmp_path, patterns, message):
    folder = without(folders["gpt2"], tmp_path, *patterns)
    with pytest.raises(UserError, match=rf"^--model hf/{folder}{message}") as caught:
        language.task(folder, texts(300))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^--model hf/nowhere: the folder is not there; give"):
        language.task("nowhere", texts(300))


def test_weights_that_do_not_fit(folders, texts, tmp_path):
    folder = without(folders["llama"], tmp_path)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"the weights are not those of its config.json: model.layers.2\S+ is missing or has another"):
        language.task(folder, texts(300))
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"hidden_size": 40}))
    with pytest.raises(UserError, match="copy cannot be loaded: |is missing or has another shape"):
        language.task(folder, texts(300))
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="copy cannot be loaded: "):
        language.task(folder, texts(300))


@pytest.mark.parametrize("make, kind", [
    (lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1,
                                                                  num_attention_heads=2, intermediate_size=8)), "BertForMaskedLM"),
    (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                                                           num_heads=2)), "T5ForConditionalGeneration")])
def test_what_is_no_causal_language_model(texts, tmp_path, make, kind):
    folder = written(make(), tmp_path / "net")
    with pytest.raises(UserError, match=f"^--model hf/{folder} is a {kind}, which is no causal language model$"):
        language.task(folder, texts(300))


def test_texts_and_windows_that_are_none(folders, texts, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    long = texts(300)
    for arguments, message in [
            ([str(tmp_path / "empty.txt")], "empty.txt is empty; give a file with text"),
            ([str(tmp_path / "bytes.txt")], "bytes.txt is no text in UTF-8"), (["nowhere.txt"], "^cannot read nowhere.txt: No such file"),
            ([str(tmp_path)], "^cannot read .*: Is a directory"),
            ([long, 33], "^--window 33: allowed are 2 to 32 tokens, which .*gpt2 was made for$"), ([long, 0], "^--window 0: "),
            ([long, 20, 21], "^--stride 21: allowed are 1 to 20 tokens, the window"), ([long, 20, 0], "^--stride 0: "),
            ([long, 32, 32, 8, 10], "300.txt has 300 tokens, fewer than 10 windows of 32 for calibration; take a longer text, or a smal"),
            ([long, 32, 32, 8, 9], r"300.txt has 12 tokens behind those for calibration \(.*\), fewer than a window of 32; take a"),
            ([long, 32, 32, 8, 1, long, texts(20)], "20.txt has 20 tokens, fewer than a window of 32; "),
            ([texts(30), 32, 32, 8, 1, long], "30.txt has 30 tokens, fewer than a window of 32; ")]:
        with pytest.raises(UserError, match=message) as caught:
            language.task(folders["gpt2"], *arguments)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(texts, tmp_path):
    model = gpt2()
    model.resize_token_embeddings(40)
    with pytest.raises(UserError, match=r"^the tokenizer makes token 60 of .*, and the model knows 40: they do not belong together$"):
        language.task(written(model, tmp_path / "net"), texts(300))


def test_without_the_package(folders, texts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="^--model hf/.*gpt2 needs the package transformers: pip install transformers$"):
        language.task(folders["gpt2"], texts(300))


# ---- eval.py --model hf/FOLDER -----------------------------------------------------------------------------------------


def test_the_table_of_a_language_model(folders, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", f"hf/{folders['gpt2']}", "--text", texts(400), "--calibration_text", texts(300, seed=1), "--window", "24",
             "--stride", "12", "--cell_bits", "2", "--adc_bits", "4", "--save_path", "out", "--ngpu", "0"]
    assert evaluation.main(flags) == 0
    float_row, quantized, row = (json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert float_row["perplexity"] == pytest.approx(recipe(language.model_of(folders["gpt2"]), ids(texts(400)), 24, 12), rel=1e-4)
    assert row["software_perplexity"] == quantized["perplexity"] == pytest.approx(float_row["perplexity"], rel=0.05)
    assert row["metric"] == "perplexity" and row["dataset"] == "windows of text" and row["metric_higher"] is False
    text = capsys.readouterr().out
    assert "perplexity" in text and "examples/s" in text and "image" not in text
    evaluation.main([*flags, "--dry_run"])
    assert "all are measured already" in capsys.readouterr().out
    evaluation.main([*flags, "--stride", "24", "--dry_run"])
    assert "all are measured already" not in capsys.readouterr().out


def test_a_search_of_a_language_model(folders, texts, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["--model", f"hf/{folders['gpt2']}", "--text", texts(400), "--validation_text", texts(300, seed=1), "--window",
                            "24", "--cell_bits", "2", "--adc_bits", "4:5", "--search", "2", "--objective", "perplexity", "bits",
                            "--batch_size", "3", "--save_path", "out", "--ngpu", "0"]) == 0
    found = list(csv.DictReader((tmp_path / "out/search.csv").read_text().splitlines()))
    assert len(found) == 2 and all(float(row["perplexity"]) > 1 for row in found) and any(row["test_perplexity"] for row in found)
    given = language.task(folders["gpt2"], texts(400), 24, batch_size=3, validation_text=texts(300, seed=1))
    whole = torch.cat([batch["targets"][batch["targets"] >= 0] for batch in given.validation])
    assert torch.equal(whole, ids(texts(300, seed=1))[1:]) and len(given.data[0]["input_ids"]) == 3


def test_code_of_a_folder_is_not_run(folders, texts, tmp_path, monkeypatch):
    """Whatever is answered to transformers' question."""
    folder = tmp_path / "own_code"
    shutil.copytree(folders["gpt2"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="own_code cannot be loaded"):
        language.task(str(folder), texts(400))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flags, message", [
    ("--model hf/{gpt2}", "^--model hf/.* needs a text that it is measured on: --text FILE$"),
    ("--model hf/{gpt2} --text {text} --state net.pt", "^--model hf/.* has its weights in that folder: leave --state out$"),
    ("--model hf/{gpt2} --text {text} --dataset digits", "^--dataset is for data sets of images, and hf/.* brings what it is measured"),
    ("--model hf/{gpt2} --text {text} --search 2", "^--search of hf/.*gpt2 chooses on a text that is not measured: --validation_text F"),
    ("--model hf/{gpt2} --text {text} --validation_text {text}", "^--validation_text is for a search: add --search N$"),
    ("--model hf/{gpt2} --text {text} --validation_text nowhere.txt --rows 64 128 --search 2", "^cannot read nowhere.txt: No such file"),
    ("--model hf/{gpt2} --text {text} --window 99", "^--window 99: allowed are 2 to 32 tokens, "),
    ("--model net.py:small --text {text}", "^--text is for language models: --model hf/FOLDER$"),
    ("--model hf/nowhere --text {text}", "^--model hf/nowhere: the folder is not there")], ids=range(9))
def test_flags_of_language_models_that_do_not_go_together(folders, texts, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    given = flags.format(gpt2=folders["gpt2"], text=texts(400)).split()
    with pytest.raises(UserError, match=message):
        evaluation.main([*given, "--cell_bits", "2", "--adc_bits", "4", "--save_path", "out", "--ngpu", "0"])
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_not_trained_by_train_py():
    with pytest.raises(UserError, match="^--model hf/x: train.py trains on images; eval.py measures language models, and examples/lang"):
        train.main(["--model", "hf/x", "--qat"])
