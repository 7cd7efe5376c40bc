"""What benchmarks/encoders.py measured, as Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

SIDES = ("jax", "torch", "compile", "onnxruntime")
"""This library; PyTorch as it is, by torch.compile; what torch.onnx.export makes of it."""
REFERENCE = "torch"


def table(measured: Mapping[str, Any]) -> Iterator[str]:
    """Markdown, one row per cell; what was skipped or is missing says so below."""
    head = (
        *("model", "dtype", "input", "batch", "JAX /s", "PyTorch /s", "torch.compile /s"),
        *("onnxruntime /s", "times PyTorch", "times the fastest other", "share of matrix rate"),
        *("MB, JAX / PyTorch", "compile s"),
    )
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    reasons: dict[str, None] = {}
    for cell in measured["cells"]:
        what = "image" if cell["kind"] == "image" else f"text, {cell['length']}"
        row = [cell["model"], cell["dtype"], what, str(cell["batch"])]
        if "skipped" in cell:
            row += [f"skipped: {cell['skipped']}", *[""] * (len(head) - 5)]
        else:
            row += [f"{cell[x]['per_second']:,.1f}" if x in cell else "missing" for x in SIDES]
            ratios = cell.get("ratio", {})
            row += [f"{ratios[REFERENCE]:.2f}" if REFERENCE in ratios else "-"]
            row += [f"**{min(ratios.values()):.2f}**" if ratios else "-"]
            ours = cell.get("jax", {})
            row += [f"{ours['share']:.0%}" if ours else "-"]
            row += [" / ".join(_mb(cell[x]) if x in cell else "-" for x in ("jax", REFERENCE))]
            row += [f"{ours['compile_s']:.1f}" if ours else "-"]
            for side, why in cell["missing"].items():
                reasons[f"{side}, {cell['model']} {cell['dtype']}: {why}"] = None
        yield "| " + " | ".join(row) + " |"
    if reasons:
        yield ""
        yield from (f"* missing: {reason}" for reason in reasons)


def _mb(side: Mapping[str, Any]) -> str:
    return "not measured" if side["extra_mb"] is None else f"{side['extra_mb']:,.0f}"
