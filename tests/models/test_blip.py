import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.errors import WeightsError
from cir_jax.models.bert import BertConfig
from cir_jax.models.blip import (
    Blip,
    BlipConfig,
    BlipVision,
    BlipVisionConfig,
    bicubic_weights,
    interpolate_positions,
    with_enc_token,
)
from cir_jax.models.clip import overwrite_tokens
from cir_jax.weights import blip as weights
from cir_jax.weights import convert
from tests import parity
from tests.parity_core import nhwc, normalised

GOLDEN = parity.ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def fixture():
    return parity.Fixture.read(GOLDEN / "blip_itm_hf_eps6.npz")


@pytest.fixture(scope="module")
def tiny(fixture):
    """(config, params, images in NHWC, token ids) of the small fixture."""
    config = BlipConfig.from_dict(fixture.config)
    params = weights.to_params(fixture.params, config)
    images = nhwc(fixture.inputs["pixel_values"])
    return config, params, images, fixture.inputs["input_ids"]


@pytest.fixture(scope="module")
def salesforce(fixture):
    """The small fixture's tensors under salesforce's names, with what their files also hold."""
    theirs = fixture.meta["salesforce_to_hf_names"]
    tensors = {old: fixture.params[new] for old, new in theirs.items()}
    width = fixture.config["text_config"]["hidden_size"]
    extra = (
        "visual_encoder_m.cls_token",
        "text_encoder_m.embeddings.word_embeddings.weight",
        "vision_proj_m.weight",
        "text_proj_m.bias",
        "image_queue",
        "text_queue",
        "idx_queue",
        "queue_ptr",
        "ptr_queue",
        "temp",
        "text_decoder.bert.encoder.layer.0.output.dense.weight",
        "text_encoder.embeddings.position_ids",
    )
    return tensors | {name: np.zeros((1, width), np.float32) for name in extra}


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


def test_both_formats_give_the_same_parameters_and_come_back(fixture, tiny, salesforce):
    config, params, *_ = tiny
    assert same(weights.to_params(salesforce, config), params)
    for layout, source in (("huggingface", fixture.params), ("salesforce", salesforce)):
        written = weights.to_tensors(params, config, layout)
        assert written.keys() <= source.keys()
        assert all(np.array_equal(array, source[name]) for name, array in written.items())


def test_config_is_read_off_a_salesforce_file():
    config = BlipConfig(
        text=BertConfig(
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=50,
            encoder_hidden_size=64,
            max_position_embeddings=20,
            bos_token_id=48,
        ),
        vision=BlipVisionConfig(
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=1,
            layer_norm_eps=1e-6,
            image_size=32,
        ),
        projection_dim=16,
    )
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), convert.joint_shapes(Blip(config)))
    assert weights.config_of(weights.to_tensors(params, config, "salesforce")) == config


@pytest.mark.parametrize(
    "size, image_size, count", [("base", 384, 223_744_258), ("large", 384, 446_128_642)]
)
def test_published_sizes(size, image_size, count):
    tree = convert.joint_shapes(Blip(BlipConfig.published(size, image_size)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


def test_config_goes_to_hugging_face_and_back(tiny):
    config = tiny[0]
    assert BlipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_padding_does_not_change_features(tiny):
    config, params, images, ids = tiny
    longer = np.pad(ids, ((0, 0), (0, 5)), constant_values=config.text.pad_token_id)
    run = jax.jit(Blip(config).apply)
    _, text, match = run({"params": params}, images, ids)
    _, same_text, same_match = run({"params": params}, images, longer)
    np.testing.assert_allclose(text, same_text, atol=1e-5)
    np.testing.assert_allclose(match, same_match, atol=1e-5)


def test_methods_give_the_fixture_features(fixture, tiny):
    """What backbones and composers call, with ids alone: padding is masked by its id."""
    config, params, images, ids = tiny
    model = Blip(config).bind({"params": params})
    words = overwrite_tokens(
        model.embed_tokens(ids),
        jnp.asarray(fixture.inputs["pseudo_positions"]),
        fixture.inputs["pseudo_tokens"],
    )
    tokens = model.visual_tokens(images)
    got = {
        "image_embeds": normalised(model.encode_image(images)),
        "text_embeds": normalised(model.encode_text(ids)),
        "pseudo_text_embeds": normalised(model.encode_text(ids, words)),
        "itm_logits": model.match(ids, tokens),
        "pseudo_itm_logits": model.match(ids, tokens, words),
    }
    for name, value in got.items():
        np.testing.assert_allclose(value, fixture.expected[name], atol=1e-5, err_msg=name)


def test_enc_token_replaces_the_first(tiny):
    config, _, _, ids = tiny
    got = np.asarray(with_enc_token(jnp.asarray(ids), config))
    assert (got[:, 0] == config.text.bos_token_id + 1).all()
    assert (got[:, 1:] == ids[:, 1:]).all()


def test_bicubic_weights_are_pytorchs():
    """Numbers of torch.nn.functional.interpolate on unit vectors."""
    grows = [[1.0868056, -0.0868056], [0.5, 0.5], [-0.0868056, 1.0868056]]
    shrinks = [[0.7734375, 0.26171875, -0.03515625], [-0.03515625, 0.26171875, 0.7734375]]
    np.testing.assert_allclose(bicubic_weights(2, 3), grows, atol=1e-6)
    np.testing.assert_allclose(bicubic_weights(3, 2), shrinks, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("size, grid", [(3, (5, 5)), (24, (14, 14)), (6, (4, 9))])
def test_interpolated_positions_are_pytorchs(size, grid):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).standard_normal((1, 1 + size * size, 4), np.float32)
    maps = torch.tensor(positions[:, 1:]).reshape(1, size, size, 4).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        maps, size=grid, mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    got = interpolate_positions(positions, grid)
    assert np.array_equal(got[:, 0], positions[:, 0])
    np.testing.assert_allclose(got[:, 1:], expected.reshape(1, -1, 4), atol=1e-5)


@pytest.mark.peer
def test_equals_transformers_live(tiny):
    """Images of another, not square size; float32, and bfloat16 as near as its 8 bits allow."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params, _, ids = tiny
    theirs = transformers.BlipForImageTextRetrieval(
        transformers.BlipConfig(**config.to_dict())
    ).eval()
    tensors = weights.to_tensors(params, config)
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    images = np.random.default_rng(0).standard_normal((3, 48, 24, 3), np.float32)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(ids, dtype=torch.long),
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            attention_mask=torch.tensor(ids != config.text.pad_token_id, dtype=torch.long),
            interpolate_pos_encoding=True,
        )
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)):

        @jax.jit
        def run(params, dtype=dtype):
            model = Blip(config, dtype).bind({"params": params})
            tokens = model.visual_tokens(images)
            return tokens, model.match(ids, tokens)

        wanted = (expected.last_hidden_state, expected.itm_score)
        for got, want in zip(run(params), wanted, strict=True):
            error = np.abs(np.asarray(got, np.float32) - want.numpy()).max()
            assert error < tolerance * np.abs(want.numpy()).max()


def test_another_image_size_on_loading_and_on_the_fly(fixture, tiny):
    config, params, images, _ = tiny
    larger = weights.resized(config, 60)
    loaded = weights.to_params(fixture.params, larger)
    assert loaded["vision"]["position_embedding"].shape == (1, 26, 32)
    images = np.pad(images, ((0, 0), (0, 24), (0, 24), (0, 0)))

    @jax.jit
    def both(loaded, params):
        one = Blip(larger).apply({"params": loaded}, images, method="encode_image")
        return one, Blip(config).apply({"params": params}, images, method="encode_image")

    one, two = both(loaded, params)
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_rematerialisation_and_half_precision(tiny):
    config, params, images, ids = tiny
    vision = dataclasses.replace(config.vision, num_hidden_layers=1)
    shallow = {key: value for key, value in params["vision"].items() if key != "layers_1"}

    def gradient(remat):
        def loss(params):
            tokens = BlipVision(vision, remat=remat).apply({"params": params}, images)
            return jnp.sum(jnp.sin(tokens))

        return jax.jit(jax.grad(loss))(shallow)

    for one, other in zip(*map(jax.tree.leaves, map(gradient, (False, True))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    half = jax.eval_shape(Blip(config, jnp.bfloat16).apply, {"params": params}, images, ids)
    assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.bfloat16)}


def test_wrong_files_and_inputs_are_told(fixture, tiny):
    config, params, images, ids = tiny
    with pytest.raises(WeightsError, match="clip.bin: tensors of an unknown model .*expected BLIP"):
        weights.to_params({"logit_scale": np.zeros(())}, config, "clip.bin")
    missing = {k: v for k, v in fixture.params.items() if k != "itm_head.bias"}
    with pytest.raises(WeightsError, match="itm_head.bias"):
        weights.to_params(missing, config)
    with pytest.raises(WeightsError, match="surprise"):
        weights.to_params(fixture.params | {"surprise": np.zeros(2)}, config)
    deeper = dataclasses.replace(config.text, num_hidden_layers=4)
    with pytest.raises(WeightsError, match="layer.3"):
        weights.to_params(fixture.params, dataclasses.replace(config, text=deeper))
    with pytest.raises(WeightsError, match=r"text_projection/kernel \(40, 16\)"):
        weights.to_params(fixture.params, dataclasses.replace(config, projection_dim=17))
    with pytest.raises(ValueError, match="25 tokens"):
        Blip(config).apply({"params": params}, np.ones((1, 25), np.int32), method="encode_text")
    with pytest.raises(ValueError, match="35 x 36 pixels"):
        Blip(config).apply({"params": params}, images[:, :35], method="encode_image")
    with pytest.raises(ValueError, match="'base' or 'large'"):
        BlipConfig.published("huge")
