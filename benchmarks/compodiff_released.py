"""CompoDiff's released network and sampler, transcribed in plain PyTorch for its benchmark."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from cir_jax.diffusion.sampling import ddim_times
from cir_jax.diffusion.schedule import Schedule


class Released:
    """The released network and sampler, with its own names of tensors (METHODS 13.2 to 13.6)."""

    def __init__(
        self,
        tensors: dict[str, np.ndarray],
        sizes: dict[str, int],
        schedule: Schedule,
        guidance: Sequence[float],
    ):
        self.t = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
        self.sizes, self.schedule, self.guidance = sizes, schedule, guidance
        dim_head = sizes["dim_head"]
        rotated = min(32, dim_head)
        angles = torch.arange(2.0)[:, None] * 10_000.0 ** (-torch.arange(0, rotated, 2) / rotated)
        self.cos, self.sin = angles.cos(), angles.sin()

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.t[f"{name}.g"], eps=1e-5)

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        for index in ("0.0", "1.0"):
            x = F.silu(self.linear(x, f"{name}.net.{index}"))
        return self.linear(x, f"{name}.net.2")

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        rotated = 2 * self.cos.shape[1]
        even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
        pairs = (even * self.cos - odd * self.sin, odd * self.cos + even * self.sin)
        return torch.cat([torch.stack(pairs, -1).flatten(-2), x[..., rotated:]], -1)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.sizes["dim_head"])).transpose(1, 2)

    def attend(self, x: torch.Tensor, bias: torch.Tensor, name: str) -> torch.Tensor:
        x = self.norm(x, f"{name}.norm")
        q = self.rotate(self.heads(self.linear(x, f"{name}.to_q")))
        k, v = self.linear(x, f"{name}.to_kv").chunk(2, -1)
        null = self.t[f"{name}.null_kv"][:, None, None].expand(2, len(x), 1, -1)
        k, v = torch.cat([null[0], self.rotate(k)], 1), torch.cat([null[1], v], 1)
        q, k = (F.normalize(z, dim=-1) * 4 for z in (q, k))
        weights = (q @ k[:, None].transpose(-1, -2) + bias).softmax(-1)
        mixed = (weights @ v[:, None]).transpose(1, 2).flatten(2)
        return self.norm(self.linear(mixed, f"{name}.to_out.0"), f"{name}.to_out.1")

    def read(self, x: torch.Tensor, context: torch.Tensor, name: str) -> torch.Tensor:
        x = self.norm(x, f"{name}.norm")
        q = self.heads(self.linear(x, f"{name}.to_q"))
        k, v = (self.heads(z) for z in self.linear(context, f"{name}.to_kv").chunk(2, -1))
        null = self.t[f"{name}.null_kv"][:, None, None, None].expand(2, *k.shape[:2], 1, -1)
        k, v = torch.cat([null[0], k], 2), torch.cat([null[1], v], 2)
        scale = self.sizes["dim_head"] ** -0.25
        weights = ((q * scale) @ (k * scale).transpose(-1, -2)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.norm(self.linear(mixed, f"{name}.to_out.0"), f"{name}.to_out.1")

    def forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.linear(self.norm(x, f"{name}.0"), f"{name}.1").chunk(2, -1)
        return self.linear(value * F.silu(gate), f"{name}.5")

    def network(
        self, x: torch.Tensor, time: int, text: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """Predicted clean embeddings [rows, dim]; the mask is of zeros."""
        rows, dim = x.shape
        at = torch.full((rows, 1), float(time))
        angles = at * torch.exp(-torch.arange(dim // 2) * np.log(1e4) / (dim // 2 - 1))
        at = self.mlp(torch.cat([angles.sin(), angles.cos()], -1), "net.to_time_embeds.0.1")
        mask = torch.zeros(rows, self.t["net.to_mask_embeds.1.net.0.0.weight"].shape[1])
        mask = self.mlp(mask, "net.to_mask_embeds.1")
        text = self.linear(text, "net.to_text_embeds.0")
        context = torch.cat([text, image[:, None], mask[:, None]], 1)
        table = self.t["net.transformer.rel_pos_bias.relative_attention_bias.weight"]
        bias = table[torch.tensor([[0, 0, 0], [1, 0, 0]])].permute(2, 0, 1)
        x = torch.stack([x, at], 1)
        for index in range(self.sizes["depth"]):
            name = f"net.transformer.layers.{index}"
            x = x + self.attend(x, bias, f"{name}.0")
            x = x + self.read(x, context, f"{name}.1")
            x = x + self.forward(f"{name}.2", x)
        x = self.norm(x / x.amax(-1, keepdim=True), "net.transformer.norm")
        return self.linear(x, "net.transformer.project_out")[:, 0]

    @torch.no_grad()
    def sample(
        self, noise: torch.Tensor, text: torch.Tensor, null: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """noise: [steps + 1, queries, samples, dim]; the mean of the samples, [queries, dim]."""
        steps, queries, samples, dim = len(noise) - 1, *noise.shape[1:]
        noise = noise.flatten(1, 2)
        text, image = (z.repeat_interleave(samples, 0) for z in (text, image))
        null = null.expand_as(text)
        texts = torch.cat([text, null, null])
        images = torch.cat([image, image, torch.zeros_like(image)])
        weights, table = self.guidance, self.schedule
        times = ddim_times(table.timesteps, steps)
        bar, shifted = table.alphas_cumprod, table.alphas_cumprod_prev
        x = noise[0]
        for draw, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True), 1):
            full, of_image, of_none = self.network(x.repeat(3, 1), now, texts, images).chunk(3)
            clean = of_none + weights[0] * (of_image - of_none) + weights[1] * (full - of_image)
            if then < 0:
                x = clean
                break
            eps = (x / bar[now] ** 0.5 - clean) / (1 / bar[now] - 1) ** 0.5
            c1 = (
                (1 - shifted[now] / shifted[then]) * (1 - shifted[then]) / (1 - shifted[now])
            ) ** 0.5
            c2 = (1 - shifted[then] - c1**2) ** 0.5
            x = float(shifted[then] ** 0.5) * clean + float(c1) * noise[draw] * (then > 0)
            x = x + float(c2) * eps
        mean = x.view(queries, samples, dim).mean(1)
        mixed = 0.9 * mean + 0.1 * image[::samples]
        return F.normalize(mixed, dim=-1)
