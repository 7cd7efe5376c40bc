"""Training steps of RTD, TAT and Combiner against plain PyTorch: seconds, equal losses.

    python benchmarks/joint.py                              # two CPU cores: 6 minutes, batch 16
    python benchmarks/joint.py --platform=gpu --batch=256 --steps=20 --rounds=5

ViT-B/32 sizes, random weights, captions of 8 to 18 words. PyTorch encodes texts at length 77, as
the released code does; both sides take the same rows in all steps, whose losses must agree, so the
updates do, too. No noise and no dropout, as no two libraries draw the same: TAT's adapter is merged
then, with dropout it is not. Combiner, on stored features, has four times the rows.

fp32 on CPU; on a GPU, PyTorch in fp16 autocast and cir_jax in bfloat16. Writes
benchmarks/joint.json.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks import oti, phi  # noqa: E402
from cir_jax.composers.base import Composer  # noqa: E402
from cir_jax.composers.combiner import NAMES, Combiner  # noqa: E402
from cir_jax.composers.rtd import Rtd  # noqa: E402
from cir_jax.composers.tat import Tat  # noqa: E402
from cir_jax.models import lora  # noqa: E402
from cir_jax.models.clip import VisionConfig  # noqa: E402
from cir_jax.sharding import mesh as meshes  # noqa: E402
from cir_jax.sharding import placement  # noqa: E402
from cir_jax.training import optimizers  # noqa: E402
from cir_jax.weights import convert  # noqa: E402
from experiments import base  # noqa: E402

WORDS = (8, 18)
"""Words of a caption."""

IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
"""Of ViT-B/32's image tower."""

PROJECTION, HIDDEN = 2560, 5120
"""Widths of Combiner."""

LEARNING_RATE = 1e-4
DECAY = 0.01

Loss = Callable[[], torch.Tensor]


def captions(rng: np.random.Generator, count: int) -> list[str]:
    words = [word for word in oti.vocabulary() if word.startswith("w") and len(word) == 3]
    return [" ".join(rng.choice(words, rng.integers(WORDS[0], WORDS[1] + 1))) for _ in range(count)]


def ids(tokenizer: Any, texts: list[str], device: str) -> tuple[np.ndarray, torch.Tensor]:
    """As training has them, cut behind the longest in steps of 8, and at length 77."""
    return tokenizer(texts), torch.from_numpy(tokenizer(texts, 77).astype(np.int64)).to(device)


class Layer(nn.Module):
    """A residual block of CLIP's image tower, with LoRA on queries and values."""

    def __init__(self, width: int, heads: int, rank: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.down = nn.ParameterDict({n: torch.zeros(width, rank) for n in ("query", "value")})
        self.up = nn.ParameterDict({n: torch.zeros(rank, width) for n in ("query", "value")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        query = self.query(y) + y @ self.down["query"] @ self.up["query"]
        value = self.value(y) + y @ self.down["value"] @ self.up["value"]

        def heads(z: torch.Tensor) -> torch.Tensor:
            return z.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(heads(query), heads(self.key(y)), heads(value))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class ImageTower(nn.Module):
    """CLIP's image tower in plain PyTorch, with our parameters and adapter."""

    def __init__(self, config: VisionConfig, params: Any, adapter: Any):
        super().__init__()
        tree = params["vision"]
        pairs = lora.pairs(adapter)
        rank = len(next(iter(pairs.values()))[1])
        width = config.hidden_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.first = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(np.shape(tree["position_embedding"])))
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        heads = config.num_attention_heads
        self.layers = nn.ModuleList(
            Layer(width, heads, rank) for _ in range(config.num_hidden_layers)
        )
        projection = params["visual_projection"]["kernel"]
        self.projection = nn.Linear(width, projection.shape[1], bias=False)
        state = {
            "patches.weight": tree["patch_embedding"]["kernel"].transpose(3, 2, 0, 1),
            "first": tree["class_embedding"],
            "positions": tree["position_embedding"],
            "projection.weight": projection.T,
        }
        norms = {"before": tree["pre_norm"], "after": tree["post_norm"]}
        linears = {}
        for i in range(config.num_hidden_layers):
            layer = tree[f"layers_{i}"]
            norms |= {f"layers.{i}.{name}": layer[name] for name in ("norm1", "norm2")}
            linears |= {f"layers.{i}.{name}": layer[name] for name in ("fc1", "fc2")}
            linears |= {f"layers.{i}.{name}": x for name, x in layer["attention"].items()}
            for name in ("query", "value"):
                a, b = pairs[f"vision/layers_{i}/attention/{name}/kernel"]
                state |= {f"layers.{i}.down.{name}": a, f"layers.{i}.up.{name}": b}
        for name, x in norms.items():
            state |= {f"{name}.weight": x["scale"], f"{name}.bias": x["bias"]}
        for name, x in linears.items():
            state |= {f"{name}.weight": x["kernel"].T, f"{name}.bias": x["bias"]}
        self.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state.items()})

    def adapter(self) -> list[nn.Parameter]:
        return [p for n, p in self.named_parameters() if ".down." in n or ".up." in n]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), 1, -1), x], dim=1)
        x = self.before(x + self.positions)
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.after(x[:, 0]))


class Fusion(nn.Module):
    """Combiner's network without dropout."""

    def __init__(self, dim: int, params: Any):
        super().__init__()
        self.text_projection_layer = nn.Linear(dim, PROJECTION)
        self.image_projection_layer = nn.Linear(dim, PROJECTION)
        self.combiner_layer = nn.Linear(2 * PROJECTION, HIDDEN)
        self.output_layer = nn.Linear(HIDDEN, dim)
        self.dynamic_scalar = nn.Sequential(
            *(nn.Linear(2 * PROJECTION, HIDDEN), nn.ReLU(), nn.Dropout(0.0)),
            *(nn.Linear(HIDDEN, 1), nn.Sigmoid()),
        )
        state = convert.to_source(params, NAMES)
        self.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state.items()})

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = [self.text_projection_layer(text), self.image_projection_layer(image)]
        both = torch.cat([F.relu(x) for x in both], dim=-1)
        share = self.dynamic_scalar(both)
        fused = self.output_layer(F.relu(self.combiner_layer(both)))
        return F.normalize((fused + share * text + (1 - share) * image).float())


def train(parameters: Any, loss: Loss, steps: int, decay: float = DECAY) -> np.ndarray:
    """float32[steps] losses of AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=decay)
    cuda, losses = torch.cuda.is_available(), []
    scaler = torch.amp.GradScaler(enabled=cuda)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.detach())
    return torch.stack(losses).float().cpu().numpy()


def rtd(args: argparse.Namespace, device: str, dtype: Any) -> Iterator[Any]:
    """Yields composer, frozen, what ours starts from, our batch; then PyTorch's steps."""
    rng = np.random.default_rng(0)
    model, params = oti.backbone(args.layers, args.width, dtype)
    composer = Rtd(model, {"name": "searle"}, noise=0.0)
    word = jax.device_get(composer.word.init(jax.random.key(1)))
    frozen = composer.freeze(params)
    start = jax.device_get(composer.take_over(word, frozen))
    texts = {
        "reference_token_ids": captions(rng, args.batch),
        "target_token_ids": captions(rng, args.batch),
        "token_ids": [composer.prompt(text) for text in captions(rng, args.batch)],
    }
    made = {name: ids(model.tokenizer, given, device) for name, given in texts.items()}
    longest = max(ours.shape[1] for ours, _ in made.values())
    batch = {name: model.tokenizer(given, longest) for name, given in texts.items()}
    yield composer, frozen, start, batch
    reference, target, composed = (made[name][1] for name in texts)
    named = ids(model.tokenizer, [composer.prompt("")] * args.batch, device)[1]

    def run() -> np.ndarray:
        anchor, learned = (oti.torch_tower(model.config, params, device) for _ in range(2))
        network = phi.torch_phi(word, device).eval()
        at = composer.word.placeholder_id

        def loss() -> torch.Tensor:
            with torch.no_grad():
                of_target, of_reference = anchor(torch.cat([target, reference]), None, at).chunk(2)
                words = network(of_reference)
            prompts = torch.cat([composed, named])
            ours = learned(prompts, torch.cat([words, words]), at)
            return phi.contrastive(torch.cat([of_target, of_reference]), ours, 0.07)

        return train(learned.parameters(), loss, args.steps)

    yield run


def tat(args: argparse.Namespace, device: str, dtype: Any) -> Iterator[Any]:
    """As `rtd`."""
    rng = np.random.default_rng(0)
    vision = VisionConfig(num_hidden_layers=args.layers, **IMAGE)
    model, params = oti.backbone(args.layers, args.width, dtype, vision)
    composer = Tat(model, dropout=0.0)
    # not zero, so that both halves of the adapter have gradients from the first step on
    start = jax.tree.map(
        lambda x: np.float32(rng.normal(0, 0.02, x.shape)),
        jax.eval_shape(composer.init, jax.random.key(0)),
    )
    pixels = rng.standard_normal((args.batch, 224, 224, 3), np.float32)
    short, long = ids(model.tokenizer, captions(rng, args.batch), device)
    yield composer, composer.freeze(params), start, {"target_images": pixels, "token_ids": short}
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.arange(args.batch, device=device)

    def run() -> np.ndarray:
        text = oti.torch_tower(model.config, params, device).requires_grad_(False)
        tower = ImageTower(vision, params, start).to(device).requires_grad_(False)
        adapter = [p.requires_grad_() for p in tower.adapter()]

        def loss() -> torch.Tensor:
            with torch.no_grad():
                words = F.normalize(text(long, None, -1).float())
            logits = F.normalize(tower(images).float()) @ words.T / 0.07
            return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)

        return train(adapter, loss, args.steps)

    yield run


def combiner(args: argparse.Namespace, device: str, dtype: Any) -> Iterator[Any]:
    """As `rtd`."""
    rng = np.random.default_rng(0)
    model, params = oti.backbone(args.layers, args.width, dtype)
    composer = Combiner(model, PROJECTION, HIDDEN, dropout=0.0)
    start = jax.device_get(jax.jit(composer.init)(jax.random.key(1)))
    rows = 4 * args.batch
    features = rng.standard_normal((2, rows, model.dim), np.float32)
    short, long = ids(model.tokenizer, captions(rng, rows), device)
    batch = {"reference_features": features[0], "target_features": features[1], "token_ids": short}
    yield composer, composer.freeze(params), start, batch
    image, target = torch.from_numpy(features).to(device)
    labels = torch.arange(rows, device=device)

    def run() -> np.ndarray:
        text = oti.torch_tower(model.config, params, device).requires_grad_(False)
        network = Fusion(model.dim, start).to(device)

        def loss() -> torch.Tensor:
            with torch.no_grad():
                words = text(long, None, -1)
            logits = 100 * network(image, words) @ F.normalize(target).T
            return F.cross_entropy(logits, labels)

        return train(network.parameters(), loss, args.steps, decay=0.0)

    yield run


METHODS = {
    "rtd": (rtd, {"only": "/text/.*"}),
    "tat": (tat, {}),
    "combiner": (combiner, {"weight_decay": 0.0}),
}


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All methods; AssertionError when the losses differ."""
    gpu = args.platform == "gpu"
    device, dtype = ("cuda", jnp.bfloat16) if gpu else ("cpu", jnp.float32)
    tolerance = 2e-2 if gpu else 1e-4
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    found: dict[str, Any] = {}
    for name, (make, changes) in METHODS.items():
        both = make(args, device, dtype)
        composer: Composer
        composer, frozen, start, batch = next(both)
        fields = {"learning_rate": LEARNING_RATE, "weight_decay": DECAY, "decay": ".*"} | changes
        optimizer = optimizers.optimizer(base.OPTIMIZER | fields, args.steps, lambda *_, **__: 0)
        frozen = placement.place(mesh, frozen)
        ours, note = phi.training(composer, frozen, optimizer, mesh, start, batch, args)
        sides = {"cir_jax": ours, "pytorch": next(both)}
        measured = oti.alternate(sides, args.rounds, tolerance)
        seconds = {side: min(times) / args.steps for side, times in measured.seconds.items()}
        found[name] = {
            "largest_loss_difference": measured.difference,
            "seconds_per_step": {side: round(best, 4) for side, best in seconds.items()},
            "median": {
                side: round(statistics.median(times) / args.steps, 4)
                for side, times in measured.seconds.items()
            },
            "speedup": round(seconds["pytorch"] / seconds["cir_jax"], 2),
            **note,
        }
        print(f"{name}: {found[name]['speedup']} times as fast")
    return oti.machine(args) | {"methods": found}


if __name__ == "__main__":
    oti.record(measure, oti.arguments(__doc__, "joint", batch=16, steps=2))
