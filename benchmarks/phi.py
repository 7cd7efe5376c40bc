"""SEARLE's phi against the same training step in plain PyTorch: images per second, equal losses.

    python benchmarks/phi.py                                # two CPU cores: 3 minutes, batch 16
    python benchmarks/phi.py --platform=gpu --batch=256 --steps=20 --rounds=5

ViT-B/32 sizes, random weights, the released loss (distillation + 0.75 phrases, top 150 cut to the
concepts there are) and optimiser; stored image features and words on the host, as in training. The
released batch is 256, too much for two cores. PyTorch runs two passes at length 77 per step, phrase
and phrase with the pseudo-word. Two forms of it: "frozen" collects no gradients of the text tower,
"released" does, because the released code leaves it trainable. Its tokenisation is not timed,
cir_jax's association with concepts and drawing of phrases is. "cached phrases" takes the features
of the unchanged phrases from the table that small phrase sets get (`cached_phrases`). All four
alternate in each round. Dropout is 0, as no two libraries draw the same; the losses of all steps
must agree, so the updates do, too.

fp32 on CPU; on a GPU, PyTorch in fp16 autocast and cir_jax in bfloat16. Writes benchmarks/phi.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import oti  # noqa: E402
from cir_jax.composers.base import Composer  # noqa: E402
from cir_jax.composers.phi import PHI_NAMES  # noqa: E402
from cir_jax.composers.searle import Searle  # noqa: E402
from cir_jax.input.phrases import PhraseBook, with_placeholder, write  # noqa: E402
from cir_jax.sharding import mesh as meshes  # noqa: E402
from cir_jax.sharding import placement  # noqa: E402
from cir_jax.training.step import Step, init_state  # noqa: E402
from cir_jax.weights import convert  # noqa: E402

TOP_K, WEIGHT_GPT, TEMPERATURE, LEARNING_RATE, DECAY = 150, 0.75, 0.25, 1e-4, 0.01
SEED = 3


def torch_phi(params: Any, device: str) -> nn.Sequential:
    """The network with our parameters; names as in the released files, less `layers.`."""
    tensors = convert.to_source(params, PHI_NAMES)
    tensors = {
        name.removeprefix("layers."): torch.from_numpy(np.array(x)) for name, x in tensors.items()
    }
    hidden, dim = tensors["0.weight"].shape
    phi = nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0),
        nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(0.0),
        nn.Linear(hidden, len(tensors["6.weight"])),
    )  # fmt: skip
    phi.load_state_dict(tensors)
    return phi.to(device)


def contrastive(a: torch.Tensor, b: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """NT-Xent over the rows of both, as SEARLE and RTD compute it."""
    rows = nn.functional.normalize(torch.cat([a, b]).float())
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    positive = torch.arange(len(rows), device=a.device).roll(len(a))
    return nn.functional.cross_entropy(logits, positive)


def torch_training(
    tower: oti.TextTower,
    trainable: bool,
    phi: nn.Module,
    images: torch.Tensor,
    words: torch.Tensor,
    texts: dict[str, torch.Tensor],
    placeholder: int,
) -> torch.Tensor:
    """The released steps: the loss of each.

    texts: int64[steps, batch, 77] ids of phrases with the placeholder, phrases.
    """
    tower.requires_grad_(trainable)
    optimizer = torch.optim.AdamW(phi.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    device = next(phi.parameters()).device
    cuda = device.type == "cuda"
    scaler = torch.amp.GradScaler(enabled=cuda)
    criterion = nn.CosineEmbeddingLoss()
    one = torch.ones(1, device=device)
    losses = []
    for replaced, original in zip(*texts.values(), strict=True):
        optimizer.zero_grad()
        features, targets = images.to(device), words.to(device)
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            estimate = phi(features)
            distil = contrastive(targets, estimate)
            of_original = tower(original, None, placeholder)
            of_replaced = tower(replaced, estimate, placeholder)
            loss = distil + WEIGHT_GPT * criterion(of_original, of_replaced, one)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    if cuda:
        torch.cuda.synchronize()
    return torch.stack(losses)


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Runs all sides in turn; the phrases are written into `directory`.

    Raises AssertionError when the losses differ.
    """
    gpu = args.platform == "gpu"
    device, tolerance = ("cuda", 2e-2) if gpu else ("cpu", 1e-4)
    rng = np.random.default_rng(0)
    model, params = oti.backbone(args.layers, args.width, jnp.bfloat16 if gpu else jnp.float32)
    book = oti.phrase_book(rng)
    book_file = directory / "phrases.json"
    write(book_file, book)
    shapes = {"reference_features": model.dim, "pseudo_words": model.token_dim}
    batch = {k: rng.standard_normal((args.batch, n), np.float32) for k, n in shapes.items()}

    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    sides: dict[str, Callable[[], np.ndarray]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name, cached in (("cir_jax", 0), ("cir_jax, cached phrases", 1 << 16)):
        composer = Searle(
            model,
            str(book_file),
            top_k=min(TOP_K, len(book.concepts)),
            dropout=0.0,
            temperature=TEMPERATURE,
            weight_gpt=WEIGHT_GPT,
            cached_phrases=cached,
        )
        frozen = placement.place(mesh, composer.freeze(params))
        start = jax.device_get(init_state(composer, optimizer, seed=SEED, ema=False).params)
        sides[name], notes[name] = training(composer, frozen, optimizer, mesh, start, batch, args)
    rng = init_state(composer, optimizer, seed=SEED, ema=False).rng
    texts = drawn_texts(composer, frozen, rng, batch, args.steps, book)
    texts = {k: torch.from_numpy(v.astype(np.int64)).to(device) for k, v in texts.items()}
    tower = oti.torch_tower(model.config, params, device)
    given = [torch.from_numpy(x) for x in batch.values()]
    for name, trainable in (("pytorch, frozen", False), ("pytorch, released", True)):

        def released(trainable: bool = trainable) -> np.ndarray:
            tower.zero_grad()
            phi = torch_phi(start, device)
            losses = torch_training(tower, trainable, phi, *given, texts, composer.placeholder_id)
            return losses.float().cpu().numpy()

        notes[name] = {"saved_for_backward_mib": oti.saved_mib(released, args.steps)}
        sides[name] = released
    return compare(sides, notes, args, tolerance)


def training(
    composer: Composer,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    start: Any,
    batch: dict[str, np.ndarray],
    args: argparse.Namespace,
) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    """Our steps from the parameters `start`, float32[steps] losses, and what is to be said."""

    def fresh() -> Any:
        # parameters are donated to the first step, so they are copied
        copied = placement.place(mesh, jax.tree.map(np.copy, start))
        return init_state(composer, optimizer, seed=SEED, ema=False, params=copied)

    state = fresh()
    step = Step(
        mesh, state, frozen, composer=composer, optimizer=optimizer, ema_decay=0.0, microbatches=1
    )
    began = time.perf_counter()
    compiled = step.lower(state, frozen, placement.global_batch(mesh, batch)).compile()
    compile_s = time.perf_counter() - began

    def run() -> np.ndarray:
        state, losses = fresh(), []
        for _ in range(args.steps):
            state, metrics = compiled(state, frozen, placement.global_batch(mesh, batch))
            losses.append(metrics["loss"])
        return np.asarray(jax.device_get(losses))

    return run, {
        "compile_seconds": round(compile_s, 1),
        "working_memory_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
    }


def drawn_texts(
    composer: Searle,
    frozen: Any,
    rng: jax.Array,
    batch: dict[str, np.ndarray],
    steps: int,
    book: PhraseBook,
) -> dict[str, np.ndarray]:
    """int[steps, batch, 77]: the phrases that the train step draws, as ids of whole texts."""
    features, tables = jnp.asarray(batch["reference_features"]), frozen["phrases"]

    @jax.jit
    def draw(number: jax.Array) -> jax.Array:
        rngs = jax.random.split(jax.random.fold_in(rng, number), len(features))
        keys = jax.vmap(jax.random.split)(rngs)[:, 1]
        top = composer.phrases.associate(tables, features)
        return composer.phrases.draw_concept_first(tables, top, keys)

    rows = np.stack([draw(i) for i in range(steps)])
    pairs = [(phrase, name) for name, phrases in book.concepts.items() for phrase in phrases]
    tokenise = composer.backbone.tokenizer
    return {
        "replaced": tokenise([with_placeholder(*pair, every=True) for pair in pairs], 77)[rows],
        "original": tokenise([phrase for phrase, _ in pairs], 77)[rows],
    }


def compare(
    sides: dict[str, Callable[[], np.ndarray]],
    notes: dict[str, dict[str, Any]],
    args: argparse.Namespace,
    tolerance: float,
) -> dict[str, Any]:
    """The report of `benchmarks.oti.compare`, by images and steps."""
    measured = oti.alternate(sides, args.rounds, tolerance)
    results = {
        name: {
            "seconds_per_step": round(min(times) / args.steps, 4),
            "median": round(statistics.median(times) / args.steps, 4),
            "images_per_second": round(args.batch * args.steps / min(times), 2),
            **notes[name],
        }
        for name, times in measured.seconds.items()
    }
    return oti.report(args, measured, results)


if __name__ == "__main__":
    oti.record(measure, oti.arguments(__doc__, "phi", batch=16, steps=2))
