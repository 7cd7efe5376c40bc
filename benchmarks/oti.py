"""SEARLE-OTI against the same algorithm in plain PyTorch: seconds of an iteration, equal losses.

    python benchmarks/oti.py [--iterations=4 --rounds=3]          # two CPU cores: 10 minutes
    python benchmarks/oti.py --platform=gpu --iterations=350

ViT-B/32 sizes, random weights, the released batch of 32 images, the same texts and start on both
sides. PyTorch runs three passes at length 77 per iteration, as the released loop does: template,
phrase with the pseudo-word, phrase. Two forms of it: "frozen" collects no weight gradients,
"released" does, because the released code leaves the text tower trainable. Its tokenisation is not
timed. cir_jax runs twice: with the features of the phrases computed in the iteration, and from the
table that small phrase sets get (`cached_phrases`). All four alternate in each round.

fp32 on CPU; on a GPU, PyTorch in fp16 autocast and cir_jax in bfloat16. An inversion is 350
iterations; fewer are run here, and images per second are those of 350 at the measured rate.
Writes benchmarks/oti.json.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from cir_jax.composers.searle_oti import SearleOti  # noqa: E402
from cir_jax.input.images import ImageTransform  # noqa: E402
from cir_jax.input.phrases import TEMPLATES, PhraseBook, with_placeholder, write  # noqa: E402
from cir_jax.input.text import word_tokenizer  # noqa: E402
from cir_jax.models.backbone import Backbone  # noqa: E402
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig  # noqa: E402

INVERSION = 350
"""Iterations of an inversion (METHODS 2.3)."""

CONCEPTS, PHRASES = 60, 20
LENGTHS = (30, 37)
"""Tokens of a phrase with start and end: GPT's are cut at 35 of its tokens, most reach that."""


class Block(nn.Module):
    """A residual block of CLIP's text tower."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class TextTower(nn.Module):
    """CLIP's text tower in plain PyTorch, always at its full context length."""

    def __init__(self, config: TextConfig, dim: int):
        super().__init__()
        width, self.eos = config.hidden_size, config.eos_token_id
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(config.max_position_embeddings, width))
        count, heads = config.num_hidden_layers, config.num_attention_heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(count))
        self.final_norm, self.projection = nn.LayerNorm(width), nn.Linear(width, dim, bias=False)
        length = config.max_position_embeddings
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, ids: torch.Tensor, words: torch.Tensor | None, at: int) -> torch.Tensor:
        """Features of int64[batch, 77]; words take the place of the first token `at` of a row."""
        x = self.embedding(ids)
        rows = torch.arange(len(ids), device=ids.device)
        if words is not None:
            x = x.clone()
            x[rows, (ids == at).int().argmax(dim=1)] = words.to(x.dtype)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, self.mask)
        end = (ids == self.eos).int().argmax(dim=1)
        return self.projection(self.final_norm(x)[rows, end])


def torch_tower(config: ClipConfig, params: Any, device: str) -> TextTower:
    """The tower with our parameters."""
    tower, text = TextTower(config.text, config.projection_dim), params["text"]
    state = {
        "embedding.weight": text["token_embedding"]["embedding"],
        "positions": text["position_embedding"],
        "projection.weight": params["text_projection"]["kernel"].T,
        "mask": tower.mask.numpy(),
    }

    def norm(name: str, tree: Any) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = tree["scale"], tree["bias"]

    def linear(name: str, tree: Any) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = tree["kernel"].T, tree["bias"]

    norm("final_norm", text["final_norm"])
    for i in range(config.text.num_hidden_layers):
        layer, name = text[f"layers_{i}"], f"blocks.{i}"
        for part in ("norm1", "norm2"):
            norm(f"{name}.{part}", layer[part])
        for part in ("fc1", "fc2"):
            linear(f"{name}.{part}", layer[part])
        linear(f"{name}.attention.out_proj", layer["attention"]["out"])
        three = [layer["attention"][part] for part in ("query", "key", "value")]
        kernels = np.concatenate([part["kernel"] for part in three], axis=1)
        state[f"{name}.attention.in_proj_weight"] = kernels.T
        state[f"{name}.attention.in_proj_bias"] = np.concatenate([p["bias"] for p in three])
    tower.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return tower.to(device)


def torch_inversion(
    tower: TextTower,
    trainable: bool,
    images: torch.Tensor,
    words: torch.Tensor,
    texts: dict[str, torch.Tensor],
    placeholder: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The released loop: mean losses of each iteration, averaged tokens.

    texts: int64[iterations, batch, 77] ids of templates, phrases with the placeholder, phrases.
    """
    tower.requires_grad_(trainable)
    words = nn.Parameter(words.clone())
    average = words.detach().clone()
    optimizer = torch.optim.AdamW([words], lr=2e-2, weight_decay=0.01)
    cuda = words.is_cuda
    scaler = torch.amp.GradScaler(enabled=cuda)
    criterion = nn.CosineEmbeddingLoss()
    one = torch.ones(1, device=words.device)
    losses = []
    for template, replaced, original in zip(*texts.values(), strict=True):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            of_template = tower(template, words, placeholder)
            of_original = tower(original, None, placeholder)
            of_replaced = tower(replaced, words, placeholder)
            image_loss = criterion(of_template, images, one)
            phrase_loss = criterion(of_replaced, of_original, one)
            loss = (image_loss + 0.5 * phrase_loss) / 1.5
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        average = 0.99 * average + 0.01 * words.detach()
        losses.append(loss.detach())
    if cuda:
        torch.cuda.synchronize()
    return torch.stack(losses), average


def vocabulary() -> list[str]:
    known = " ".join(TEMPLATES).replace("{}", " ").lower().split()
    made_up = [f"w{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    return sorted({*known, "of", "that", *made_up})


def phrase_book(rng: np.random.Generator) -> PhraseBook:
    """Phrases as long as GPT's: "a photo of {concept} that ...", words made up."""
    words = [word for word in vocabulary() if word.startswith("w") and len(word) == 3]
    concepts = {}
    for name in rng.choice(words, CONCEPTS, replace=False):
        sizes = rng.integers(LENGTHS[0], LENGTHS[1] + 1, PHRASES) - 7  # start, end, the prompt
        suffixes = [" ".join(rng.choice(words, size)) for size in sizes]
        concepts[str(name)] = tuple(f"a photo of {name} that {text}" for text in suffixes)
    return PhraseBook(TEMPLATES, concepts)


def backbone(
    layers: int, width: int, dtype: Any, vision: VisionConfig | None = None
) -> tuple[Backbone, Any]:
    """ViT-B/32's text tower with random weights; vision: its image tower, None = of one layer."""
    tokenizer = word_tokenizer(vocabulary(), 77)
    config = ClipConfig(
        text=TextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        ),
        vision=vision or VisionConfig(num_hidden_layers=1),
    )
    made = Backbone(Clip(config, dtype), tokenizer, ImageTransform(224, 224), f"random-{layers}")
    return made, jax.device_get(jax.jit(made.init)(jax.random.key(0)))


def arguments(about: str, name: str, **defaults: int) -> argparse.Namespace:
    """The flags of the benchmark `name`; `defaults` are its own ones, whole numbers."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    for flag, default in (defaults | {"rounds": 3, "layers": 12, "width": 512}).items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / f"{name}.json")
    return parser.parse_args()


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Runs all sides in turn; the phrases are written into `directory`.

    Raises AssertionError when the losses differ.
    """
    gpu = args.platform == "gpu"
    device, tolerance = ("cuda", 2e-2) if gpu else ("cpu", 1e-4)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    rng = np.random.default_rng(0)
    model, params = backbone(args.layers, args.width, dtype)
    book = phrase_book(rng)
    book_file = directory / "phrases.json"
    write(book_file, book)
    images = rng.standard_normal((args.batch, model.dim), np.float32)
    rngs = jax.random.split(jax.random.key(1), args.batch)
    sides: dict[str, Callable[[], np.ndarray]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name, cached in (("cir_jax", 0), ("cir_jax, cached phrases", 1 << 16)):
        composer = SearleOti(
            model, str(book_file), iterations=args.iterations, cached_phrases=cached
        )
        os.environ["CIR_JAX_CACHE"] = f"{directory}/{cached}"  # each computes all its features
        began = time.perf_counter()
        frozen = jax.tree.map(jnp.asarray, composer.freeze(params))
        frozen_s = time.perf_counter() - began
        top = composer.phrases.associate(frozen["phrases"], jnp.asarray(images))
        begin = composer.initial_words(rngs)
        began = time.perf_counter()
        run = jax.jit(composer.optimise).lower(frozen, begin, images, top, rngs).compile()
        notes[name] = {
            "compile_seconds": round(time.perf_counter() - began, 1),
            "working_memory_mib": round(run.memory_analysis().temp_size_in_bytes / 2**20),
            "features_before_the_start_seconds": round(frozen_s, 1),
        }

        def inversion(run: Any, frozen: Any, begin: Any, top: Any) -> np.ndarray:
            return np.asarray(run(frozen, begin, images, top, rngs)[1].total.mean(axis=1))

        sides[name] = functools.partial(inversion, run, frozen, begin, top)
    texts = drawn_texts(composer, frozen, top, rngs, args.iterations, book)
    texts = {k: torch.from_numpy(v.astype(np.int64)).to(device) for k, v in texts.items()}
    tower = torch_tower(model.config, params, device)
    words = torch.from_numpy(np.array(begin)).to(device)
    given = torch.from_numpy(images).to(device)
    for name, trainable in (("pytorch, frozen", False), ("pytorch, released", True)):

        def loop(trainable: bool = trainable) -> np.ndarray:
            tower.zero_grad()
            losses, _ = torch_inversion(
                tower, trainable, given, words, texts, composer.placeholder_id
            )
            return losses.float().cpu().numpy()

        notes[name] = {"saved_for_backward_mib": saved_mib(loop, args.iterations)}
        sides[name] = loop
    return compare(sides, notes, args, tolerance)


def drawn_texts(
    composer: Any, frozen: Any, top: Any, rngs: Any, iterations: int, book: PhraseBook
) -> dict[str, np.ndarray]:
    """int[iterations, batch, 77]: what cir_jax draws, as ids of whole texts."""
    draw = jax.jit(composer.draw)
    drawn = [draw(frozen["phrases"], top, rngs, i) for i in range(iterations)]
    templates, rows = (np.stack(x) for x in zip(*drawn, strict=True))
    pairs = [(phrase, name) for name, phrases in book.concepts.items() for phrase in phrases]
    tokenise = composer.backbone.tokenizer
    ids = {
        "template": tokenise([t.format(" $ ") for t in book.templates], 77)[templates],
        "replaced": tokenise([with_placeholder(*pair) for pair in pairs], 77)[rows],
        "original": tokenise([phrase for phrase, _ in pairs], 77)[rows],
    }
    return ids


def saved_mib(loop: Callable[[], Any], iterations: int) -> int:
    """What PyTorch keeps for the backward pass of an iteration; also its warm-up."""
    total, seen = 0, set()

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = x.untyped_storage()
        if isinstance(x, nn.Parameter) or storage.data_ptr() in seen:
            return x
        seen.add(storage.data_ptr())
        total += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loop()
    return round(total / iterations / 2**20)


class Measured(NamedTuple):
    """seconds: of each side, in each round. difference: the largest of the losses, relative."""

    seconds: dict[str, list[float]]
    difference: float


def alternate(
    sides: dict[str, Callable[[], np.ndarray]], rounds: int, tolerance: float
) -> Measured:
    """Times all sides in turn and checks their losses against those of the first of PyTorch.

    Raises AssertionError when the losses differ by more than the tolerance.
    """
    expected = next(side for name, side in sides.items() if name.startswith("pytorch"))()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    difference = 0.0
    for name, side in sides.items():
        if name.startswith("cir_jax"):
            side()  # warm; PyTorch is, `saved_mib` ran it
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            losses = side()
            seconds[name].append(time.perf_counter() - began)
            error = float(np.abs(losses - expected).max() / np.abs(expected).max())
            assert error < tolerance, f"{name}: losses differ by {error:.1e}"
            difference = max(difference, error)
    return Measured(seconds, difference)


def compare(
    sides: dict[str, Callable[[], np.ndarray]],
    notes: dict[str, dict[str, Any]],
    args: argparse.Namespace,
    tolerance: float,
) -> dict[str, Any]:
    """The report on all sides."""
    measured = alternate(sides, args.rounds, tolerance)
    results = {}
    for name, times in measured.seconds.items():
        best = min(times) / args.iterations
        results[name] = {
            "seconds_per_iteration": round(best, 4),
            "median": round(statistics.median(times) / args.iterations, 4),
            "images_per_second_at_350_iterations": round(args.batch / (INVERSION * best), 4),
            **notes[name],
        }
    return report(args, measured, results)


def report(
    args: argparse.Namespace, measured: Measured, results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Settings, machine, results, and how many times as fast as PyTorch ours are."""
    best = {name: min(times) for name, times in measured.seconds.items()}
    speedup = {
        f"{ours} over {theirs}": round(best[theirs] / best[ours], 2)
        for ours in best
        if ours.startswith("cir_jax")
        for theirs in best
        if theirs.startswith("pytorch")
    }
    found = machine(args)
    found["settings"] |= {"phrase_tokens": LENGTHS, "phrases": CONCEPTS * PHRASES}
    return found | {
        "largest_loss_difference": measured.difference,
        "results": results,
        "speedup": speedup,
    }


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Settings and machine of a report."""
    return {
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "jax": jax.__version__,
            "torch": torch.__version__,
            "load_average": [round(x, 1) for x in os.getloadavg()],
            "matrix_gflops": matrix_gflops(args.platform),
        },
    }


def matrix_gflops(name: str, size: int = 2048) -> dict[str, int]:
    """Of each library, its best product of square matrices on "cpu" (fp32) or "gpu" (bf16, fp16).

    Where products decide, the libraries can differ by no more than this and what they compute.
    """
    gpu = name == "gpu"
    ours = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16 if gpu else jnp.float32)
    theirs = torch.randn(size, size, device="cuda" if gpu else "cpu")
    theirs = theirs.half() if gpu else theirs
    multiply = jax.jit(lambda x: x @ x)

    def torch_product() -> None:
        theirs @ theirs
        if gpu:
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    for _ in range(10):
        for side, run in (
            ("jax", lambda: multiply(ours).block_until_ready()),
            ("torch", torch_product),
        ):
            began = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - began)
    return {side: round(2 * size**3 / min(times) / 1e9) for side, times in seconds.items()}


def prepare(name: str) -> None:
    """Both libraries on the platform "cpu" or "gpu", with all cores."""
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[name])
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def record(
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]], args: argparse.Namespace
) -> None:
    """Runs a benchmark with an empty feature cache; its report goes to the file and the screen."""
    prepare(args.platform)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["CIR_JAX_CACHE"] = f"{directory}/cache"
        found = measure(args, Path(directory))
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    record(measure, arguments(__doc__, "oti", batch=32, iterations=4))
