"""The route by a language model: its text format, what it may write, and how it is sampled."""

import json
import sys

import numpy as np
import pytest

from cir_jax.errors import ConfigError, DataError, WeightsError
from data.sharing import Shard
from data.synthtriplets import instructions, language_model, tuning
from data.synthtriplets.instructions import parse
from data.synthtriplets.language_model import LanguageModel
from data.synthtriplets.triplets import CaptionTriplets
from data.text_triplets import captions
from tests.data.corpora import records

LETTERS = [*"abcdefghijklmnopqrstuvwxyzEND #%\n.", "<|endoftext|>"]


class Killed(BaseException):
    pass


class Parrot:
    """Completes as told: by the number that the caption begins with."""

    identity = {"model": "parrot"}
    kinds = (
        "make it red\n%%\na red star\nEND",
        "make it red\n%%\na red star",
        "make it red\nEND",
        "make it red\n%%\n \nEND",
        None,
        "do\n%%\nnothing\n%%\nmore\nEND",
        " make it blue \n%%\na blue star \nEND and more",
    )

    def __init__(self):
        self.seen, self.left = [], 1 << 20

    def complete(self, prompts, streams):
        self.left -= 1
        if not self.left:
            raise Killed
        self.seen += zip(prompts, streams, strict=True)
        return [self.kinds[int(p.split()[0]) % len(self.kinds)] for p in prompts]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(instructions, "BLOCK", 4)


@pytest.fixture
def texts(tmp_path):
    lines = [f"{i} a star" for i in range(22)]
    lines[3] = ""
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    return captions.read(str(tmp_path / "captions.txt"), tmp_path, {})


def test_examples_have_the_format_of_instruct_pix2pix(tmp_path):
    row = {"input": "a star.", "edit": "make it red", "output": "a red star", "url": "x"}
    (tmp_path / "ip2p.jsonl").write_text(json.dumps(row))
    assert records("text_triplets", tmp_path)[0]["text"] == "make it red"  # no --columns
    triplets = CaptionTriplets(tmp_path / "ip2p.jsonl", {})
    assert instructions.write_examples(triplets, tmp_path / "tune.jsonl") == 1
    (line,) = (tmp_path / "tune.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line == {
        "prompt": "a star.\n##\n", "completion": "make it red\n%%\na red star\nEND"
    }  # fmt: skip
    assert parse("a star.", line["completion"]) == ("make it red", "a red star")
    with pytest.raises(ConfigError, match="tune.txt: expected a name that ends in .jsonl"):
        instructions.write_examples(triplets, tmp_path / "tune.txt")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("make it red\n%%\na red star\nEND", ("make it red", "a red star")),
        (" make it red \n%%\n a red star \nEND\n##\n more", ("make it red", "a red star")),
        (None, "too long"),
        ("make it red\n%%\na red star", "unfinished"),
        ("make it red END", "unfinished"),
        ("make it red\nEND", "no edit"),
        ("make it red %% a red star\nEND", "no edit"),
        ("a\n%%\nb\n%%\nc\nEND", "no edit"),
        ("\n%%\na red star\nEND", "empty"),
        ("make it red\n%%\n\nEND", "empty"),
        ("nothing\n%%\nA STAR!\nEND", "unchanged"),
        ("nothing\n%%\na star\nEND", "unchanged"),
        ("nothing\n%%\na star of\nEND", ("nothing", "a star of")),
    ],
)
def test_completions_are_read_or_have_a_problem(written, found):
    assert parse("a star.", written) == found
    assert isinstance(found, tuple) or found in instructions.PROBLEMS


def test_what_is_malformed_is_counted(texts, tmp_path, capsys):
    counts = instructions.write(texts, tmp_path / "t.jsonl", Parrot(), seed=5)
    # of 0..21 without 3: kinds 0 (0, 7, 14, 21) and 6 (6, 13, 20) are triplets
    dropped = {"too long": 3, "unfinished": 3, "no edit": 6, "empty": 2}
    assert counts == {"triplets": 7, **dropped}
    assert sum(counts.values()) == 21
    assert "t.jsonl: 7 triplets; dropped: 3 too long, 3 unfinished, 6 no edit, 2 empty" in (
        capsys.readouterr().err
    )
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "reference_caption": "0 a star",
        "target_caption": "a red star",
        "conditioning_caption": "make it red",
    }
    assert [line["reference_caption"].split()[0] for line in lines] == (
        ["0", "6", "7", "13", "14", "20", "21"]
    )
    # no keywords: the filter of instructions is the one that is asked
    triplet = next(iter(CaptionTriplets(tmp_path / "t.jsonl", {}).blocks(9, 0, 1)))[1][0]
    assert (triplet.source_keyword, triplet.target_keyword) == ("", "")


def test_a_killed_or_shared_run_writes_the_same_lines(texts, tmp_path):
    instructions.write(texts, tmp_path / "whole.jsonl", Parrot(), per_caption=2, seed=5)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert whole.count(b"\n") == 7  # the parrot says the same twice, which counts once
    dying, again = Parrot(), Parrot()
    dying.left = 3
    with pytest.raises(Killed):
        instructions.write(texts, tmp_path / "a.jsonl", dying, per_caption=2, seed=5)
    instructions.write(texts, tmp_path / "a.jsonl", again, per_caption=2, seed=5)
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    streams = [stream for _, stream in dying.seen + again.seen]
    assert len(set(streams)) == len(streams) == 42 and streams[1] == "5/0/0/1"
    for i in range(2):
        instructions.write(
            texts, tmp_path / "b.jsonl", Parrot(), per_caption=2, seed=5, shard=Shard(i, 2)
        )
    parts = [(tmp_path / f"b-0000{i}-of-00002.jsonl").read_bytes().splitlines() for i in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole.splitlines()) and all(parts)
    with pytest.raises(DataError, match=r"of other captions or settings \(seed 5, now 6\)"):
        instructions.write(texts, tmp_path / "a.jsonl", Parrot(), per_caption=2, seed=6)
    with pytest.raises(ConfigError, match="--samples=0: expected 1 or more"):
        instructions.write(texts, tmp_path / "a.jsonl", Parrot(), per_caption=0)


# The model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random GPT-2 of width 16 that knows single characters."""
    pytest.importorskip("torch")
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(LETTERS)}, []))
    plain.decoder = tokenizers.decoders.Fuse()
    end = len(LETTERS) - 1
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=LETTERS[end], bos_token=LETTERS[end]
    ).save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=len(LETTERS), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=end, eos_token_id=end, initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return str(directory)


def test_rows_do_not_depend_on_one_another(model):
    lm = LanguageModel(model, max_tokens=12)
    prompts = ["a star\n##\n", "a ring on a red box\n##\n", "a star\n##\n", "a" * 53]
    streams = ["0/0", "0/1", "0/2", "0/3"]
    together = lm.complete(prompts, streams)
    assert together[3] is None  # 53 and 12 are more than 64
    assert together[0] != together[2]
    for i in range(3):
        assert lm.complete(prompts[i : i + 1], streams[i : i + 1]) == [together[i]]
    assert all(0 < len(text) <= 12 for text in together[:3])
    assert lm.complete([], []) == []


def test_what_a_random_model_writes_is_counted_as_malformed(model, texts, tmp_path):
    lm = LanguageModel(model, max_tokens=12)
    counts = instructions.write(texts, tmp_path / "t.jsonl", lm)
    assert counts == {"triplets": 0, "unfinished": 21}
    assert (tmp_path / "t.jsonl").read_text() == ""


def test_a_row_ends_at_its_end(model, monkeypatch):
    """A model that spells one text: what follows END is not written."""
    import torch

    lm = LanguageModel(model, max_tokens=40)
    spelled = "make it red\n%%\na red star\nEND. and more"

    def spell(sampled, scores, numbers):
        ids = [LETTERS.index(spelled[min(sampled.shape[1], len(spelled) - 1)])] * len(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(ids)[:, None], 0.0)

    monkeypatch.setattr(language_model, "draw", spell)
    (text,) = lm.complete(["a star\n##\n"], ["0"])
    assert text == spelled.partition(". and")[0]
    assert parse("a star", text) == ("make it red", "a red star")


def test_tokens_are_drawn_by_their_probabilities():
    torch = pytest.importorskip("torch")
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2]])) * language_model.TEMPERATURE

    def drawn(number, sampled=()):
        ids = torch.tensor([list(sampled)], dtype=torch.int64).reshape(1, -1)
        numbers = np.full((1, len(sampled) + 1), number)
        left = language_model.draw(ids, scores, numbers)
        assert torch.isfinite(left).sum() == 1
        return int(left.argmax())

    assert [drawn(x) for x in (0.0, 0.49, 0.51, 0.79, 0.81, 1 - 1e-16)] == [0, 0, 1, 1, 2, 2]
    # each time that a token was there, its logit falls by 0.1 before the temperature
    weight = 0.5 * np.exp(-0.1 * 3 / 0.7)
    edge = weight / (weight + 0.5)
    assert [drawn(x, (0, 0, 0)) for x in (edge - 1e-6, edge + 1e-6)] == [0, 1]
    settings = (language_model.TEMPERATURE, language_model.MAX_TOKENS)
    assert (*settings, language_model.FREQUENCY_PENALTY) == (0.7, 256, 0.1)


def test_a_lora_of_peft_is_taken(model, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    plain = LanguageModel(model, max_tokens=12)
    tuned = LanguageModel(model, str(tmp_path / "lora"), max_tokens=12)
    before, after = (lm._model.state_dict() for lm in (plain, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("c_attn" in name or "c_proj" in name for name in changed)
    assert len(tuned.complete(["a star\n##\n"], ["0"])) == 1
    assert tuned.identity != plain.identity
    with pytest.raises(WeightsError, match="--adapter=.*nothing: no LoRA of this model there"):
        LanguageModel(model, str(tmp_path / "nothing"))
    with pytest.raises(WeightsError, match="no causal language model there"):
        LanguageModel(str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"--adapter=.*pip install 'cir_jax\[synth\]'"):
        LanguageModel(model, str(tmp_path / "lora"))


# Tuning it


EXAMPLES = [
    (instructions.prompt(f"a {x} star"), instructions.completion(f"make it {y}", f"a {y} star"))
    for x in ("red", "blue", "green")
    for y in ("pink", "white")
]
RECIPE = tuning.Recipe(rank=4, epochs=20, batch_size=2, microbatch=1, learning_rate=0.05)


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    pytest.importorskip("peft")
    output = tmp_path_factory.mktemp("tuned") / "lora"
    counts = tuning.tune([*EXAMPLES, (EXAMPLES[0][0], "x" * 300)], output, model, RECIPE)
    assert counts == {"examples": 6, "too long": 1}
    return output


def losses(model, adapter):
    """Of the completions, and of the prompts."""
    import torch

    lm = LanguageModel(model, adapter)
    found = []
    for prompt, completion in EXAMPLES:
        first, whole = (lm._tokenizer(x)["input_ids"] for x in (prompt, prompt + completion))
        with torch.no_grad():
            logits = lm._model(torch.tensor([whole])).logits[0, :-1]
        of_each = torch.nn.functional.cross_entropy(
            logits, torch.tensor(whole[1:]), reduction="none"
        )
        found.append([x.mean().item() for x in of_each.tensor_split([len(first) - 1])])
    return np.mean(found, axis=0)[::-1]


def test_a_lora_learns_the_completions(model, tuned):
    (before, prompts), (after, prompts_after) = losses(model, ""), losses(model, str(tuned))
    assert after < before - 0.5
    assert before - after > 2 * (prompts - prompts_after)  # of these nothing is asked
    assert not (tuned.parent / "lora.parts" / "checkpoints").exists()


def test_a_killed_tuning_goes_on_to_the_same_lora(model, tuned, tmp_path, monkeypatch):
    import safetensors.numpy
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

        def on_save(self, args, state, control, **_):
            if steps[0] == 1 and state.global_step == 4:
                raise Killed

    made, steps = tuning._trainer, []

    def watched(*args):
        trainer = made(*args)
        trainer.add_callback(Watch())
        assert (trainer.args.train_batch_size, trainer.args.gradient_accumulation_steps) == (1, 2)
        return trainer

    monkeypatch.setattr(tuning, "SAVED", 2)
    monkeypatch.setattr(tuning, "_trainer", watched)
    with pytest.raises(Killed):
        tuning.tune(EXAMPLES, tmp_path / "lora", model, RECIPE)
    checkpoints = tmp_path / "lora.parts" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    (checkpoints / "checkpoint-6").mkdir()  # what a kill leaves of one
    with pytest.raises(DataError, match=r"other examples or settings \(rank 4, now 3\)"):
        tuning.tune(EXAMPLES, tmp_path / "lora", model, RECIPE._replace(rank=3))
    steps.clear()
    tuning.tune(EXAMPLES, tmp_path / "lora", model, RECIPE)
    assert steps[0] == 5
    whole, again = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (tuned, tmp_path / "lora")
    )
    assert set(whole) == set(again)
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)
    at = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_mtime_ns
    tuning.tune(EXAMPLES, tmp_path / "lora", model, RECIPE)  # is there
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_mtime_ns == at


def test_the_last_checkpoint_that_is_whole_is_the_one_of_most_steps(tmp_path):
    assert tuning._last(tmp_path) is None
    for step in (200, 1000, 1200):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (200, 1000):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert tuning._last(tmp_path) == str(tmp_path / "checkpoint-1000")


def test_what_cannot_be_tuned(model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    file = tmp_path / "tune.jsonl"
    for text, said in (
        ("", "tune.jsonl: no examples"),
        ('{"prompt": "a"}\n', "tune.jsonl, line 1: KeyError.*expected an object with"),
        ('{"prompt": "a", "completion": "b"}\n[\n', "tune.jsonl, line 2: JSONDecodeError"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: an empty prompt or completion"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            tuning.read_examples(file)
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        tuning.read_examples(tmp_path / "nowhere")
    output = tmp_path / "lora"
    with pytest.raises(ConfigError, match="--batch_size=2 is not divisible by --microbatch=3"):
        tuning.tune(EXAMPLES, output, model, RECIPE._replace(microbatch=3))
    with pytest.raises(ConfigError, match="--epochs=0: expected more than 0"):
        tuning.tune(EXAMPLES, output, model, RECIPE._replace(epochs=0))
    with pytest.raises(DataError, match="no example fits into .*: all 1 are too long"):
        tuning.tune([("a", "b" * 90)], output, model, RECIPE)
    assert not any(path.name.startswith("lora") for path in tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"--step=tune: .*pip install 'cir_jax\[synth\]'"):
        tuning.tune(EXAMPLES, output, model, RECIPE)
