"""The model card of an adapter: what it is, how it was made, what it reached."""

from __future__ import annotations

import json

from oomproof.tuning.cache import DataFacts
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.plan import TrainingPlan
from oomproof.tuning.report import TuningReport
from oomproof.units import format_bytes


def card(
    report: TuningReport,
    plan: TrainingPlan,
    settings: TuningSettings,
    facts: DataFacts,
    *,
    base: str,
    versions: str,
) -> str:
    """README.md of the adapter's folder, with the hub's metadata at its top.

    Args:
        report: What was done.
        plan: What was planned.
        settings: What was asked.
        facts: Of the data.
        base: The base model, as the hub or a path names it.
        versions: Of the packages.
    """
    adapter = settings.adapter
    rows = {
        "base": f"`{base}` in {plan.format}, computed in {plan.compute_dtype}",
        "adapter": f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, dropout "
        f"{adapter.dropout:g}, on {', '.join(adapter.target_modules)}: "
        f"{report.trainable_parameters:,} parameters",
        "data": f"{_plain(facts.name)}, {facts.size_bytes:,} bytes, {facts.samples:,} samples, "
        f"{facts.learned_tokens:,} learned of {facts.tokens:,} tokens",
        "data's SHA-256": f"`{facts.sha256}`",
        "held out": f"{plan.data.validation_samples:,} samples",
        "steps": f"{report.steps:,} of {plan.batch_size:,} sequences of up to {plan.context:,} "
        f"tokens, {plan.epochs:.3g} epochs"
        + (", packed" if plan.packing else "")
        + f"; the adapter is that of step {report.adapter_step:,}",
        "optimizer": f"{plan.optimizer}, learning rate {settings.learning_rate:g}, cosine after "
        f"{settings.warmup:.0%} warm-up, weight decay {settings.weight_decay:g}, "
        f"gradients clipped at {settings.max_grad_norm:g}",
        "seed": str(settings.seed),
        "loss, held out": _change(report.validation_before, report.validation_after, 4),
        "perplexity, held out": _change(report.perplexity_before, report.perplexity_after, 2),
        "loss, last step": "–" if report.loss is None else f"{report.loss:.4f}",
        "memory": f"{format_bytes(report.planned_bytes)} planned, "
        f"{format_bytes(report.measured_bytes)} measured on {plan.device}",
        "speed": "–"
        if report.tokens_per_second is None
        else f"{report.tokens_per_second:,.0f} tokens/s",
        "made with": versions,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    # JSON strings are YAML strings, whatever is in them.
    of_the_hub = f"base_model: {json.dumps(base)}\n" if "/" in base else ""
    return f"""---
{of_the_hub}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- qlora
- oomproof
---
# A LoRA adapter for {_plain(base)}

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({json.dumps(_name(report.folder))})
```

| | |
|---|---|
{table}

![Loss over the steps](loss.svg)
"""


def _change(before: float | None, after: float | None, digits: int) -> str:
    if before is None or after is None:
        return "–"
    return f"{before:.{digits}f} before, {after:.{digits}f} after"


def _name(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[2] or folder


def _plain(text: str) -> str:
    """Text that no markup can be in."""
    return "".join(one if one.isprintable() and one not in "|`<>[]*" else "_" for one in text)
