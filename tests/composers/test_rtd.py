"""RTD: what is learned, compared and read. Values of the original are in tests/golden."""

import fnmatch
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers import build, official
from cir_jax.composers.losses import nt_xent
from cir_jax.composers.rtd import Rtd, tuned_pattern
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.input.keywords import TextTriplets
from cir_jax.models import subtree
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from cir_jax.weights import clip as clip_weights
from cir_jax.weights import convert
from tests.composers import inversion

WORD = {"name": "lincir"}
GOLDEN = Path(__file__).parents[1] / "golden" / "rtd_loss.npz"


def triplets(backbone, count=inversion.ROWS):
    words = "red blue green star circle square".split()
    record = {
        "reference_caption": "a {} star".format,
        "target_caption": "a {} circle".format,
        "text": "is a {} circle".format,
    }
    make = TextTriplets(backbone.tokenizer, "a photo of $ that {}")
    rows = [
        make.random_map({name: text(words[i % 3]).encode() for name, text in record.items()}, None)
        for i in range(count)
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def made(tiny):
    backbone, backbone_params = tiny
    composer = Rtd(backbone, WORD)
    frozen = composer.freeze(backbone_params)
    word = jax.jit(composer.word.init)(jax.random.key(0))
    return composer, composer.take_over(word, frozen), frozen


@pytest.fixture(scope="module")
def encoded(made, tiny):
    """The rows of a batch, with texts the learned encoder reads otherwise than the anchor."""
    composer, params, frozen = made
    params = params | {"text": jax.tree.map(lambda x: x * 1.1, params["text"])}
    keys = jax.random.split(jax.random.key(0), inversion.ROWS)
    return jax.jit(composer.encode)(params, frozen, triplets(tiny[0]), keys)


def test_the_loss_does_not_depend_on_devices_or_parts(made, tiny):
    inversion.assert_independent_of_devices_and_parts(*made, triplets(tiny[0]), least=3e-2)


def test_it_begins_as_the_method_inside(made, tiny):
    composer, params, frozen = made
    query = {
        "reference_features": inversion.features(tiny[0], 4),
        "token_ids": tiny[0].tokenizer([composer.prompt("is red")] * 4),
    }
    ours = jax.jit(composer.compose)(params, frozen, query, jax.random.key(0))
    alone = jax.jit(composer.word.compose)(params["word"], frozen, query, jax.random.key(0))
    np.testing.assert_array_equal(ours, alone)
    assert composer.take_over(params, frozen) is params


def test_the_learned_encoder_is_asked_and_the_words_stand_still(made, tiny):
    composer, params, frozen = made
    moved = params | {"text": jax.tree.map(lambda x: x * 1.5, params["text"])}
    query = {
        "reference_features": inversion.features(tiny[0], 4),
        "token_ids": tiny[0].tokenizer([composer.prompt("is red")] * 4),
    }
    compose = jax.jit(composer.compose)
    key = jax.random.key(0)
    before, after = (compose(p, frozen, query, key) for p in (params, moved))
    assert np.abs(before - after).max() > 1e-2
    one = compose(moved, frozen, {name: x[2:3] for name, x in query.items()}, key)
    np.testing.assert_allclose(one, after[2:3], rtol=1e-4, atol=1e-6)
    _, grads = inversion.loss_and_gradient(*made, triplets(tiny[0]))
    assert all((x == 0).all() for x in jax.tree.leaves(grads["word"]))
    flat = convert.flatten(grads["text"])
    assert all(np.abs(x).max() > 0 for name, x in flat.items() if "key" not in name)


def test_negatives_of_a_device_are_those_of_its_rows(made, encoded):
    composer, params, _ = made
    halves = [{name: x[part] for name, x in encoded.items()} for part in np.split(np.arange(16), 2)]
    objective = jax.jit(composer.objective)
    expected = np.mean([objective(params, half)[0] for half in halves])
    grouped = jax.jit(Rtd(composer.backbone, WORD, negatives=8).objective)
    np.testing.assert_allclose(grouped(params, encoded)[0], expected, rtol=1e-6)
    assert abs(objective(params, encoded)[0] - expected) > 0.1
    with pytest.raises(ConfigError, match="negatives=5: the batch of 16 rows is no multiple"):
        Rtd(composer.backbone, WORD, negatives=5).objective(params, encoded)


def test_without_hard_negatives_there_are_only_the_triplets(made, encoded, tiny):
    composer, params, frozen = made
    alone = Rtd(composer.backbone, WORD, hard_negatives=False, temperature=0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    rows = jax.eval_shape(alone.encode, params, frozen, triplets(tiny[0], 4), keys)
    assert set(rows) == {"target", "composed"}
    two = {name: encoded[name] for name in rows}
    expected = jax.jit(nt_xent)(two["target"], two["composed"], 0.5)
    np.testing.assert_allclose(jax.jit(alone.objective)(params, two)[0], expected, rtol=1e-6)


def test_noise_is_of_each_row_and_scaled(made, tiny):
    composer, params, frozen = made
    batch = {name: np.repeat(x[:1], 3, axis=0) for name, x in triplets(tiny[0], 1).items()}
    keys = jax.random.split(jax.random.key(0))[jnp.array([0, 0, 1])]
    drawn = jax.jit(jax.vmap(composer.draw))(keys)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    for noise, differs in ((3.0, True), (0.0, False)):
        other = Rtd(composer.backbone, WORD, noise=noise)
        rows = jax.jit(other.encode)(params, frozen, batch, keys)["named"]
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-6)
        assert (np.abs(rows[0] - rows[2]).max() > 1e-3) == differs


def test_types_of_noise_have_their_spread(made):
    keys = jax.random.split(jax.random.key(1), 500)
    for name, deviation in (("scaled", 3**-0.5), ("gaussian", 1.0), ("uniform", 3**-0.5)):
        composer = Rtd(made[0].backbone, WORD, noise_type=name)
        drawn = np.asarray(jax.jit(jax.vmap(composer.draw))(keys))
        assert drawn.shape == (500, composer.backbone.dim)
        np.testing.assert_allclose(drawn.std(), deviation, rtol=0.05)
        assert abs(drawn.mean()) < 0.05 and (np.abs(drawn).max() <= 1) == (name == "uniform")


def test_variants_learn_the_shares_of_table_8():
    """Of L/14's text encoder; which parameters, by the names of the original."""
    config = ClipConfig(
        TextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
        VisionConfig(
            image_size=32, patch_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        projection_dim=768,
    )
    ids = jnp.zeros((1, 4), jnp.int32)
    init = lambda: Clip(config).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), ids)  # noqa: E731
    params = jax.eval_shape(init)["params"]
    theirs = {path: name for name, (path, _) in clip_weights.hf_names(config).items()}
    official_ = json.loads(str(np.load(GOLDEN)["meta"]))["trainable_variants"]
    of_12 = {
        "full": (100.0, official_["full"]),
        "fcs": (45.8, official_["whole_fcs"]),
        "front": (11.5, official_["front_3_fcs"]),
        "last": (11.5, official_["last_3_fcs_of_12"]),
        "middle": (11.5, official_["middle_3_fcs_of_12_candidates"][1]),
        "interleaved": (11.5, official_["interleave_3_fcs_of_12_candidates"][1]),
    }

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    tower = convert.flatten({name: params[name] for name in ("text", "text_projection")})
    for tuned, (share, patterns) in of_12.items():
        learned = subtree.chosen(params, tuned_pattern(tuned, 12))
        assert round(100 * count(learned) / count(tower), 1) == share
        named = {theirs[path] for path in convert.flatten(learned)}
        every = {theirs[path] for path in tower}
        assert named == {n for n in every if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


def test_captions_are_cleaned_and_modification_texts_are_not(tiny):
    """A placeholder in one is replaced, too, as released."""
    tokenizer = tiny[0].tokenizer
    texts = {"reference": b" a $ RED star ", "target": b"a <PERSON> $", "text": b"is $ and red"}
    names = {"text": "text"} | {name: f"{name}_caption" for name in ("reference", "target")}
    element = {names[name]: text for name, text in texts.items()}
    found = TextTriplets(tokenizer, "a photo of $ that {}").random_map(element, None)
    expected = ("a  red star", "a person", "a photo of $ that is $ and red")
    ids = tokenizer(expected, length=tokenizer.context_length)
    for name, row in zip(
        ("reference_token_ids", "target_token_ids", "token_ids"), ids, strict=True
    ):
        np.testing.assert_array_equal(found[name], row)


def test_only_what_is_learned_is_held_twice(tiny):
    composer = Rtd(tiny[0], WORD, tuned="fcs")
    frozen = composer.freeze(tiny[1])
    word = jax.eval_shape(composer.word.init, jax.random.key(0))
    learned = composer.take_over(word, frozen)["text"]
    assert {path[-2] for path in convert.flatten(learned)} == {"fc1", "fc2"}
    whole = composer.encoders({"text": jax.tree.map(lambda x: x + 1, learned)}, frozen)
    for path, x in convert.flatten(frozen["backbone"]).items():
        moved = convert.flatten(whole)[path]
        assert moved is x or path in convert.flatten(learned), path
        np.testing.assert_allclose(moved, x + 1 if path in convert.flatten(learned) else x)


def test_files_of_the_authors_are_read_and_written(tiny, tmp_path):
    """As `torch.save({"epoch", "CLIPTextModelWithProjection": model.state_dict()})` writes them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    backbone, backbone_params = tiny
    composer = Rtd(backbone, WORD)
    frozen = composer.freeze(backbone_params)
    text = backbone.config.text
    config = transformers.CLIPTextConfig(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size, num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads, projection_dim=backbone.dim,
        max_position_embeddings=text.max_position_embeddings,
        hidden_act=text.hidden_act,
        bos_token_id=backbone.tokenizer.bos_id, eos_token_id=backbone.tokenizer.eos_id,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config).eval()
    state = model.state_dict()
    # transformers of the authors' time stored these, too
    state["text_model.embeddings.position_ids"] = torch.arange(text.max_position_embeddings)[None]
    file, word_file = tmp_path / "text_encoder_best.pt", tmp_path / "lincir.pt"
    torch.save({"epoch": 3, "CLIPTextModelWithProjection": state}, file)
    word = jax.device_get(jax.jit(composer.word.init)(jax.random.key(1)))
    official.save(composer.word, word_file, word, frozen)

    both = official.given(f"official:{word_file},{file}")
    params = official.load(composer, both, frozen)
    jax.tree.map(np.testing.assert_array_equal, params["word"], word)
    ids = backbone.tokenizer(["a red star", "blue and two circle"])
    ours = jax.jit(backbone.encode_text)(composer.encoders(params, frozen), ids)
    theirs = model(torch.from_numpy(ids).long()).text_embeds
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)

    official.save(composer, tmp_path / "mine.pt", params, frozen)
    written = torch.load(tmp_path / "mine.pt", weights_only=True)["CLIPTextModelWithProjection"]
    model.load_state_dict(written)  # every tensor, and no other
    again = official.load(composer, [tmp_path / "mine.word.pt", tmp_path / "mine.pt"], frozen)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    alone = official.load(composer, word_file, frozen)  # RTD begins with these
    jax.tree.map(np.testing.assert_array_equal, alone["text"], made_of(frozen, composer))
    with pytest.raises(WeightsError, match="without the network of words .*WORD_FILE,TEXT_ENC"):
        official.load(composer, file, frozen)
    with pytest.raises(WeightsError, match="lincir.pt: holds 'word' of the method, as a file befo"):
        official.load(composer, [word_file, word_file], frozen)
    with pytest.raises(WeightsError, match="not among what this composer learns: set .*tuned=full"):
        official.load(Rtd(backbone, WORD, tuned="fcs"), both, frozen)
    torch.save({"epoch": 3, "CLIPTextModelWithProjection": {"more": torch.zeros(2)} | state}, file)
    with pytest.raises(WeightsError, match="more"):
        official.load(composer, both, frozen)


def made_of(frozen, composer):
    return subtree.chosen(frozen["backbone"], composer.pattern)


def test_mistakes_are_named(tiny):
    backbone = tiny[0]
    for settings, message in (
        ({"word": {"name": "slerp"}}, "word.name='slerp': RTD is put around .*pic2word, searle or"),
        ({"word": {}}, "expected the name of a pseudo-word method"),
        ({"word": {"name": "lincri"}}, "lincir"),
        ({"word": WORD, "tuned": "half"}, "half"),
        ({"word": WORD, "tuned": "middle"}, "is three layers; this text encoder has 2"),
        ({"word": WORD, "noise": -1.0}, "noise=-1.0: expected 0 or more"),
        ({"word": WORD, "noise_type": "normal"}, "noise_type of rtd: 'normal'.*gaussian"),
        ({"word": WORD, "temperature": 0.0}, "temperature=0.0: expected more than 0"),
        ({"word": WORD, "negatives": -1}, "negatives=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("rtd", backbone, **settings)
    with pytest.raises(ConfigError, match="'nothing/.*' matches no parameter of the backbone. Pat"):
        subtree.chosen(tiny[1], "nothing/.*")
