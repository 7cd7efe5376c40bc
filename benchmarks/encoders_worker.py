"""One side of encoders.py, which starts it: `encoders_worker.py SIDE THREADS DIRECTORY`.

Reads requests from the standard input, one line of JSON each, and answers on the standard output:
{"value": ...}, or {"missing": why} where the side cannot do what it is asked.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MATRIX = {"cpu": 2048, "gpu": 8192}
"""Rows and columns of the matrices whose product gives the device's matrix rate."""


class Cannot(Exception):
    """Why a side does not measure something, in words for the table."""


class Side:
    """What all sides share: timing and the process's memory."""

    name: str

    def __init__(self, threads: int, directory: Path):
        self.directory = directory
        self.run: Callable[[], Any] = lambda: None
        """Starts one pass, returns what `wait` waits for."""

    def wait(self, result: Any) -> None:
        raise NotImplementedError

    def time(self, passes: int) -> float:
        """Seconds per pass."""
        start = time.perf_counter()
        for _ in range(passes):
            result = self.run()
        self.wait(result)
        return (time.perf_counter() - start) / passes

    def matrix(self, dtype: str, seconds: float) -> float:
        """Operations per second of the fastest product of two square matrices in `seconds`."""
        size = MATRIX[self.platform]
        self.run = self.product(size, dtype)
        self.time(1)
        taken = [self.time(1)]
        while sum(taken) < seconds:
            taken.append(self.time(1))
        return 2 * size**3 / min(taken)

    def first_pass(self) -> tuple[Any, dict[str, Any]]:
        """The features; its seconds, and MB at its peak beyond the weights and inputs."""
        reset = _reset_peak()
        before, start = _status("VmRSS"), time.perf_counter()
        result = self.run()
        self.wait(result)
        seconds = time.perf_counter() - start
        return result, {"pass_s": seconds, "extra_mb": _status("VmHWM") - before if reset else None}


class Jax(Side):
    name = "jax"

    def __init__(self, threads: int, directory: Path):
        super().__init__(threads, directory)
        import jax

        self.jax, self.device = jax, jax.devices()[0]
        self.platform = "cpu" if self.device.platform == "cpu" else "gpu"

    def about(self, dtypes: list[str]) -> dict[str, Any]:
        return {"platform": self.platform, "device": self.device.device_kind}

    def wait(self, result: Any) -> None:
        result.block_until_ready()

    def product(self, size: int, dtype: str) -> Callable[[], Any]:
        x = self.jax.random.normal(self.jax.random.key(0), (size, size)).astype(dtype)
        self.precision(dtype)
        multiply = self.jax.jit(lambda a: a @ a)
        return lambda: multiply(x)

    def precision(self, dtype: str) -> None:
        # PyTorch's default, too; else a GPU would take TF32 on this side alone
        full = "highest" if dtype == "float32" else None
        self.jax.config.update("jax_default_matmul_precision", full)

    def load(self, model: str, dtype: str) -> None:
        import jax.numpy as jnp
        from safetensors.numpy import load_file

        from cir_jax.input import images
        from cir_jax.models.backbone import Backbone
        from cir_jax.models.clip import Clip, ClipConfig
        from cir_jax.weights import clip, convert

        self.params = self.compiled = self.run = None
        config = ClipConfig.from_dict(json.loads((self.directory / "config.json").read_text()))
        params = convert.to_ours(
            load_file(self.directory / "model.safetensors"),
            clip.hf_names(config),
            ignore=clip.IGNORE,
            dtype=jnp.dtype(dtype),
        )
        self.params = self.jax.device_put(params, self.device)
        # ids and normalised pixels come in: there is no tokenizer
        transform = images.clip(config.vision.image_size)
        self.backbone = Backbone(Clip(config, jnp.dtype(dtype)), None, transform, "")

    def prepare(self, kind: str, dtype: str, **_: Any) -> dict[str, Any]:
        self.precision(dtype)
        encode = self.backbone.encode_image if kind == "image" else self.backbone.encode_text
        x = np.load(self.directory / "input.npy")
        x = self.jax.device_put(x.astype(dtype) if kind == "image" else x, self.device)

        start = time.perf_counter()
        compiled = self.jax.jit(encode).lower(self.params, x).compile()
        seconds = time.perf_counter() - start
        self.run = lambda: compiled(self.params, x)
        features, about = self.first_pass()
        np.save(self.directory / f"{self.name}.npy", np.asarray(features).astype(np.float32))
        if self.platform == "gpu":
            # what XLA allots before it starts; it asks for nothing more while it runs
            planned = compiled.memory_analysis()
            size = planned.temp_size_in_bytes + planned.output_size_in_bytes
            about["extra_mb"] = size / 2**20
        return {"compile_s": seconds, **about}


class Torch(Side):
    name = "torch"

    def __init__(self, threads: int, directory: Path):
        super().__init__(threads, directory)
        import torch

        self.torch = torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.platform = "gpu" if torch.cuda.is_available() else "cpu"
        self.device = "cuda" if self.platform == "gpu" else "cpu"

    def about(self, dtypes: list[str]) -> dict[str, Any]:
        settings = {
            "torch_threads": self.torch.get_num_threads(),
            "torch_float32_precision": self.torch.get_float32_matmul_precision(),
        }
        return {"platform": self.platform, "settings": settings}

    def wait(self, result: Any) -> None:
        if self.platform == "gpu":
            self.torch.cuda.synchronize()

    def product(self, size: int, dtype: str) -> Callable[[], Any]:
        x = self.torch.randn(size, size, device=self.device).to(getattr(self.torch, dtype))
        return lambda: x @ x

    def make(self, model: str, config: dict[str, Any]) -> dict[str, Any]:
        """Writes random weights and their config, and returns the config, whole."""
        from transformers import CLIPConfig, CLIPModel

        last = config["text_config"].get("vocab_size", 49408) - 1
        text = {**config["text_config"], "eos_token_id": last}
        config = {**config, "text_config": {"bos_token_id": last - 1, **text}}
        self.torch.manual_seed(0)
        CLIPModel(CLIPConfig(**config)).save_pretrained(self.directory)
        return json.loads((self.directory / "config.json").read_text())

    def load(self, model: str, dtype: str) -> None:
        from transformers import CLIPModel

        self.model = self.run = None
        self.towers: dict[str, Callable[..., Any]] = {}
        dtype = getattr(self.torch, dtype)
        self.model = CLIPModel.from_pretrained(self.directory, dtype=dtype).to(self.device).eval()
        for parameter in self.model.parameters():
            # pages of the file that are read later would count as memory of the first pass
            parameter.data = parameter.data.clone()

    def input(self, kind: str, dtype: str) -> Any:
        x = self.torch.from_numpy(np.load(self.directory / "input.npy")).to(self.device)
        if kind != "image":
            return x.long()
        # as its preprocessing gives them: channels first
        return x.permute(0, 3, 1, 2).contiguous().to(getattr(self.torch, dtype))

    def encode(self, tower: str) -> Callable[..., Any]:
        name = "get_image_features" if tower == "image" else "get_text_features"
        method = getattr(self.model, name)

        def encode(x: Any) -> Any:
            features = method(x)
            return getattr(features, "pooler_output", features)

        return encode

    def compiled(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        return encode

    def prepare(self, kind: str, dtype: str, **_: Any) -> dict[str, Any]:
        torch, x, compiled = self.torch, self.input(kind, dtype), {}
        tower = "image" if kind == "image" else "text"
        if tower not in self.towers:
            self.towers[tower] = self.compiled(self.encode(tower))
        encode = self.towers[tower]

        def run() -> Any:
            with torch.inference_mode():
                return encode(x)

        self.run, before = run, 0
        if type(self) is not Torch:
            start = time.perf_counter()
            self.wait(run())
            compiled = {"compile_s": time.perf_counter() - start}
        if self.platform == "gpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        features, about = self.first_pass()
        if self.platform == "gpu":
            about["extra_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        np.save(self.directory / f"{self.name}.npy", features.float().cpu().numpy())
        return {**compiled, **about}


class Compile(Torch):
    """torch.compile with its defaults: a shape is compiled for itself, later ones for any size."""

    name = "compile"

    def load(self, model: str, dtype: str) -> None:
        if dtype != "float32" and self.platform == "cpu":
            raise Cannot("measured in float32 only")
        super().load(model, dtype)

    def compiled(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        return self.torch.compile(encode)


class Onnx(Torch):
    """onnxruntime with its defaults, on what torch.onnx.export makes of the same model."""

    name = "onnxruntime"

    def __init__(self, threads: int, directory: Path):
        super().__init__(threads, directory)
        import onnxruntime
        import onnxscript  # noqa: F401, torch.onnx.export needs it

        self.runtime, self.threads = onnxruntime, threads
        wanted = "CUDAExecutionProvider" if self.platform == "gpu" else "CPUExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise Cannot(f"this onnxruntime has no {wanted}")
        self.providers = [wanted]

    def load(self, model: str, dtype: str) -> None:
        if dtype != "float32":
            raise Cannot("measured in float32 only")
        super().load(model, dtype)
        self.sessions: dict[str, Any] = {}

    def prepare(self, kind: str, dtype: str, **_: Any) -> dict[str, Any]:
        tower = "image" if kind == "image" else "text"
        x, start = self.input(kind, dtype), time.perf_counter()
        if tower not in self.sessions:
            self.sessions[tower] = self.session(tower, x)
        seconds = time.perf_counter() - start
        session, feed = self.sessions[tower], {"x": x.cpu().numpy()}
        self.run = lambda: session.run(None, feed)[0]
        features, about = self.first_pass()
        np.save(self.directory / f"{self.name}.npy", features)
        return {"compile_s": seconds, **about}

    def session(self, tower: str, x: Any) -> Any:
        """Exported for any batch and length, the first of which must not be 1."""
        torch, path = self.torch, self.directory / f"{tower}.onnx"
        x = torch.cat([x, x])
        axes = {0: torch.export.Dim("batch")}
        if tower == "text":
            axes[1] = torch.export.Dim("length", max=77)
        encode = self.encode(tower)

        class Module(torch.nn.Module):
            def __init__(self, model: Any):
                super().__init__()
                self.model = model

            def forward(self, x: Any) -> Any:
                return encode(x)

        torch.onnx.export(
            Module(self.model).eval(),
            (x,),
            path,
            input_names=["x"],
            dynamic_shapes=(axes,),
            dynamo=True,
            verbose=False,
        )
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return self.runtime.InferenceSession(path, options, providers=self.providers)


def _reset_peak() -> bool:
    """Gives freed memory back and starts a new peak of the process's memory (Linux, glibc)."""
    import ctypes

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> float:
    """MB of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"/proc/self/status has no {field}")


def main() -> None:
    name, threads, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    # both sides make as many threads as there are cores they may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    sides = {side.name: side for side in (Jax, Torch, Compile, Onnx)}
    try:
        side: Any = sides[name](threads, directory)
    except Exception as error:
        side = Missing(error)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(side, request.pop("do"))(**request)}
        except Exception as error:
            if not isinstance(side, Missing) and not isinstance(error, Cannot):
                traceback.print_exc()
            answer = {"missing": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Missing:
    """A side that could not even start: every request is answered with the reason."""

    def __init__(self, error: Exception):
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


def reason(error: Exception) -> str:
    """One line, which goes into the file and the table."""
    if isinstance(error, Cannot):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()[:200]


if __name__ == "__main__":
    main()
