"""Train the bundled model: a small, real Llama with its own tokenizer and chat template.

    python tools/train_tiny.py --train train.txt --valid valid.txt --test test.txt --out DIR

writes a Hugging Face model folder (config.json, model.safetensors in bfloat16, tokenizer,
chat template, generation config), a model card whose every figure was measured by that run,
and the same figures as JSON (training.json). About a minute on one H200 for ``--preset tiny``.
``--preset micro --device cpu --steps 20`` is a smoke run; ``--set field=value`` changes one
field of the preset (``--set num_hidden_layers=7``), which the card then records.

The model is ``transformers.LlamaForCausalLM`` itself (Touvron et al. 2023; grouped-query
attention as in Llama 2 and 3), untied head. What the training follows:

* Muon for the hidden matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/),
  matrices of one shape orthogonalised together in one batch; AdamW for embedding, head, norms.
* Warm-up, then the learning rate falls linearly to zero (Bergsma et al. 2025,
  https://arxiv.org/abs/2502.15938), so that the last weights need no averaging.
* Output projections and head start at zero, as in modded-nanogpt.
* The last part of training runs at the full context length, so that the length that
  config.json states is one that the model has been trained on.
* Chat documents are cut from the corpus itself: the user gives the beginning of a passage, the
  assistant goes on and stops at the end of a sentence or paragraph.

Determinism: the tokenizer, the chat documents and the order of the data depend on the corpus and
``--seed`` alone. The weights are the same from run to run on the same machine with the same
versions (deterministic kernels are asked for; one that does not exist is warned of).

Bits per byte is the model's negative log2-likelihood of a text, every token counted once, divided
by the text's UTF-8 bytes: it does not depend on the tokenizer. The test text is read once, after
training, with the weights as saved.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
import transformers
from torch import Tensor, nn

BOS, USER, ASSISTANT, END = "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (BOS, USER, ASSISTANT, END)
"""In the order of their ids, 0 to 3. ``<|end|>`` ends a turn, and so a generation."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {{- message['content'] | trim -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|>' + message['content'] | trim + '<|end|>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|assistant|>' + message['content'] | trim + '<|end|>' -}}
  {%- else -%}
    {{- raise_exception("a message is from 'user', 'assistant' or, first of all, 'system'; not '"
        + message['role'] + "'") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's split into words, with two digits to a token at most: the vocabulary is small."""

RAW_PROMPTS = ("It was a dark night", "And it came to pass", "ROMEO:\n", "The Congress should")
CHAT_PROMPTS = (
    "It was a dark night",
    "Who goes there?",
    '"My dear child," said the old lady, "what has happened to you?"',
    "Fellow citizens, our country is at peace with all the world.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Shape and recipe of one model."""

    vocab_size: int
    """Special tokens and the 256 bytes included."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """The context length in tokens; rows have it from ``full_length_from`` on."""
    sequence_length: int
    """Tokens to a training row before that."""
    steps: int
    batch_tokens: int
    """Tokens to a step, whatever the row length."""
    muon_lr: float = 0.02
    """For the hidden matrices: the spectral norm of one update (before the shape's factor)."""
    embedding_lr: float = 0.01
    head_lr: float = 0.004
    norm_lr: float = 0.004
    weight_decay: float = 0.1
    """Decoupled, of the matrices; norms have none."""
    warmup: float = 0.03
    """Fraction of the steps over which the learning rates rise."""
    full_length_from: float = 0.8
    """Fraction of the steps after which rows have the full context length."""
    chat_fraction: float = 0.22
    """Fraction of the rows that are chat documents."""
    passage_fraction: float = 0.5
    """Fraction of the plain rows that begin at a paragraph, after ``<|bos|>``; others begin
    anywhere."""
    max_folder_bytes: int | None = None
    """The output folder may hold no more than this."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "vocab_size"):
            if getattr(self, name) % 64:
                raise ValueError(f"{name} is {getattr(self, name)}: take a multiple of 64")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not share {self.num_key_value_heads} "
                "key-value heads evenly"
            )
        if self.batch_tokens % self.max_position_embeddings:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}: take a multiple of "
                f"max_position_embeddings, {self.max_position_embeddings}"
            )
        if self.max_position_embeddings % self.sequence_length:
            raise ValueError(
                f"sequence_length is {self.sequence_length}: take a divisor of "
                f"max_position_embeddings, {self.max_position_embeddings}"
            )


PRESETS = {
    "tiny": Preset(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        sequence_length=512,
        steps=1000,
        batch_tokens=32768,
        weight_decay=0.3,
        max_folder_bytes=8_000_000,
    ),
    "small": Preset(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        sequence_length=512,
        steps=400,
        batch_tokens=32768,
        weight_decay=0.3,
    ),
    "micro": Preset(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        sequence_length=64,
        steps=20,
        batch_tokens=512,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """One text file."""

    name: str
    """The file's base name."""
    text: str
    num_bytes: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Corpus:
        """Read ``path``, byte for byte (no newline is translated)."""
        raw = path.read_bytes()
        text = raw.decode("utf-8")
        for token in SPECIAL_TOKENS:
            if token in text:
                raise ValueError(f"{path.name} holds {token}, which is a special token: remove it")
        return cls(
            name=path.name,
            text=text,
            num_bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What one look at the validation text showed."""

    step: int
    train_loss: float
    """Nats per token, of the last batch (chat rows included)."""
    valid_bits_per_byte: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run measured; the card and training.json hold nothing else."""

    parameters: int
    bytes_per_token: float
    """UTF-8 bytes of the training text to one token."""
    train_tokens: int
    """Tokens of the training text."""
    tokens_seen: int
    plain_epochs: float
    """Passes over the training text by the plain rows."""
    valid_bits_per_byte: float
    test_bits_per_byte: float
    chat_stop_rate: float
    """Fraction of sampled answers to sentences of the validation text that end with <|end|>
    within ``chat_stop_tokens``."""
    chat_stop_tokens: int
    chat_answers: int
    tokenizer_s: float
    training_s: float
    peak_device_bytes: int | None
    history: list[Checkpoint]


# Tokenizer


def paragraphs(text: str) -> list[str]:
    """Cut ``text`` after each run of blank lines; the pieces joined are the text."""
    cuts = [0, *(m.end() for m in re.finditer(r"\n[^\S\n]*\n\s*", text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def train_tokenizer(text: str, vocab_size: int, context: int) -> Any:
    """Train a byte-level BPE on ``text``; it encodes every string and never needs ``<unk>``."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(paragraphs(text), trainer)
    # As with Llama's own tokenizers, encoding adds <|bos|> unless told not to.
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        padding_side="left",
    )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, no ``<|bos|>`` added."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


# Chat documents


def render_chat(system: str, turns: list[tuple[str, str]]) -> str:
    """Render as ``CHAT_TEMPLATE`` does: ``turns`` are (user, assistant)."""
    return (
        BOS
        + system.strip()
        + "".join(f"{USER}{u.strip()}{END}{ASSISTANT}{a.strip()}{END}" for u, a in turns)
    )


class ChatWriter:
    """Cuts chat documents out of a text.

    The user gives a paragraph, its first sentences or its first words; the assistant goes on to
    the end of a sentence or, rather, of a paragraph, about 120 tokens away at most.
    """

    MAX_CHARACTERS = 600
    """Longer messages are not made (a table of contents has no sentence end)."""

    def __init__(self, text: str, rng: random.Random) -> None:
        text = re.sub(r"(?m)^\d+:\d+ ", "", text)  # verse numbers: no one speaks them
        self.text = text
        self.rng = rng
        lengths = [len(p) for p in paragraphs(text)]
        self.starts = [sum_ for sum_ in _running_sum(lengths) if sum_ < len(text)]
        self.paragraph_ends = [*self.starts[1:], len(text)]
        sentence = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"')\]_]*(?=\s)")
        self.ends = sorted({m.end() for m in sentence.finditer(text)} | set(self.paragraph_ends))

    def documents(self) -> list[str]:
        """One pass over the text."""
        found: list[str] = []
        i = 0
        while i < len(self.starts):
            document, at = self._document(self.starts[i])
            if document is not None:
                found.append(document)
            i = max(i + 1, bisect.bisect_left(self.starts, at))
        return found

    def _document(self, at: int) -> tuple[str | None, int]:
        system = ""
        if self.rng.random() < 0.1:
            end = self._after(self.paragraph_ends, at)
            if end is not None:
                system, at = self.text[at:end], end
        turns: list[tuple[str, str]] = []
        for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3))):
            middle = self._user_end(at)
            end = None if middle is None else self._reply_end(middle)
            if middle is None or end is None:
                break
            user, reply = self.text[at:middle].strip(), self.text[middle:end].strip()
            if not user or not reply:
                break
            turns.append((user, reply))
            at = end
        return (render_chat(system, turns) if turns else None), at

    def _after(self, ends: list[int], at: int, skip: int = 0) -> int | None:
        """The end after ``at`` and ``skip`` more, if it is near enough."""
        i = bisect.bisect_right(ends, at) + skip
        near = i < len(ends) and ends[i] - at <= self.MAX_CHARACTERS
        return ends[i] if near else None

    def _user_end(self, at: int) -> int | None:
        style = self.rng.random()
        if style < 0.3:  # words of one paragraph, and not its last
            words = re.compile(rf"\s*(?:\S+\s){{{self.rng.randint(2, 11)}}}\S+(?=\s\S)")
            match = words.match(self.text, at, at + self.MAX_CHARACTERS)
            if match:
                return match.end()
        elif style < 0.6:
            return self._after(self.paragraph_ends, at)
        return self._after(self.ends, at, skip=self.rng.choice((0, 0, 1, 2)))

    def _reply_end(self, at: int) -> int | None:
        limit = at + self.rng.randint(120, 440)
        ends = self.paragraph_ends if self.rng.random() < 0.6 else self.ends
        for candidates in (ends, self.ends):
            i = bisect.bisect_right(candidates, limit) - 1
            if i >= 0 and candidates[i] > at + 40:
                return candidates[i]
        return self._after(self.ends, at)


def _running_sum(lengths: list[int]) -> list[int]:
    total, sums = 0, [0]
    for length in lengths:
        total += length
        sums.append(total)
    return sums


# Data


class Rows:
    """Training rows, gathered on the device from two token streams that lie there.

    Plain rows go through the text in passes: each pass cuts it at another offset and shuffles
    the pieces. Some are moved back to the beginning of their paragraph and begin with
    ``<|bos|>``. Chat rows begin at a chat document drawn at random.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        *,
        preset: Preset,
        seed: int,
        device: torch.device,
        chat_passes: int = 2,
    ) -> None:
        self.preset = preset
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        bos = tokenizer.bos_token_id
        plain = encode(tokenizer, paragraphs(text))
        # One <|bos|> before the text, so that a paragraph's row can begin one token before it.
        self.plain = torch.tensor([bos, *(t for ids in plain for t in ids)], device=device)
        self.passage_starts = torch.tensor(_running_sum([len(ids) for ids in plain])[:-1])
        writer = ChatWriter(text, random.Random(seed))
        documents = [d for _ in range(chat_passes) for d in writer.documents()]
        writer.rng.shuffle(documents)
        chat = encode(tokenizer, documents)
        self.chat = torch.tensor([t for ids in chat for t in ids], device=device)
        self.chat_starts = torch.tensor(_running_sum([len(ids) for ids in chat])[:-1])
        self.bos = bos
        self.plain_rows_tokens = 0
        self._waiting = torch.empty(0, dtype=torch.long)
        self._waiting_length = 0
        shortest = min(len(self.plain), len(self.chat))
        if shortest < preset.max_position_embeddings + 2:
            raise ValueError(
                f"the training text gives {shortest} tokens of plain or chat rows, fewer than "
                f"one row of {preset.max_position_embeddings}: use a longer text"
            )

    def next(self, count: int, length: int) -> Tensor:
        """Draw a batch, ``[count, length + 1]``: inputs and, one further, targets."""
        n_chat = round(count * self.preset.chat_fraction)
        starts = self._plain_starts(count - n_chat, length)
        drawn = torch.rand(len(starts), generator=self.generator) < self.preset.passage_fraction
        passage = torch.searchsorted(self.passage_starts, starts, right=True) - 1
        starts = torch.where(drawn, self.passage_starts[passage.clamp(min=0)], starts)
        plain = self._gather(self.plain, starts, length)
        plain[:, 0].masked_fill_(drawn.to(self.device), self.bos)
        self.plain_rows_tokens += plain.numel() - len(plain)
        fitting = int(torch.searchsorted(self.chat_starts, len(self.chat) - length))
        picked = torch.randint(fitting, (n_chat,), generator=self.generator)
        return torch.cat([plain, self._gather(self.chat, self.chat_starts[picked], length)])

    def _plain_starts(self, count: int, length: int) -> Tensor:
        if length != self._waiting_length:
            self._waiting, self._waiting_length = self._waiting[:0], length
        while len(self._waiting) < count:
            offset = int(torch.randint(length, (), generator=self.generator))
            # The last piece of a pass may be short: it is left to another pass's offset.
            starts = torch.arange(offset % (len(self.plain) - length), len(self.plain) - length)
            starts = starts[::length]
            order = torch.randperm(len(starts), generator=self.generator)
            self._waiting = torch.cat([self._waiting, starts[order]])
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def _gather(self, stream: Tensor, starts: Tensor, length: int) -> Tensor:
        columns = torch.arange(length + 1, device=self.device)
        return stream[starts.to(self.device)[:, None] + columns]


# Model and optimisers


def llama_config(preset: Preset) -> Any:
    """The ``config.json`` of a preset."""
    return transformers.LlamaConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_key_value_heads,
        head_dim=preset.head_dim,
        max_position_embeddings=preset.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(END),
    )


def build_model(preset: Preset) -> Any:
    """An untrained Llama, in float32."""
    config = llama_config(preset)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(std=0.3)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    return model


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each of ``[n, rows, columns]`` near one (Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024
    x: Tensor = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if tall else x


class Muon:
    """Muon with decoupled weight decay; matrices of one shape are updated as one batch."""

    def __init__(
        self, parameters: list[nn.Parameter], *, weight_decay: float, momentum: float = 0.95
    ) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        self.batches = [
            (ps, torch.zeros(len(ps), *shape, device=ps[0].device))
            for shape, ps in by_shape.items()
        ]
        self.weight_decay = weight_decay
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients, which it drops."""
        for parameters, average in self.batches:
            gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
            average.lerp_(gradients, 1 - self.momentum)
            updates = orthogonalise(gradients.lerp_(average, self.momentum))  # Nesterov
            rows, columns = updates.shape[1:]
            scale = lr * math.sqrt(max(1.0, rows / columns))
            for parameter, update in zip(parameters, updates.float().unbind(), strict=True):
                parameter.mul_(1 - lr * self.weight_decay).add_(update, alpha=-scale)
                parameter.grad = None


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Rise over the first ``warmup`` of the steps, then fall to zero in a line."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


@torch.no_grad()
def bits_per_byte(
    model: Any, ids: list[int], num_bytes: int, *, window: int, stride: int, rows: int = 32
) -> float:
    """-log2 P(text) / bytes, of the text whose token ids are ``ids``.

    Windows of ``window`` tokens, each ``stride`` further: a token is counted once, in the first
    window that reaches it, so it sees ``window - stride`` tokens or more before it (the first
    ones of the text: all there are, and ``<|bos|>``).
    """
    device = next(model.parameters()).device
    sequence = torch.tensor([model.config.bos_token_id, *ids], device=device)
    predicted = len(ids)  # targets are sequence[1:]
    width = min(window, predicted)
    starts = [*range(0, predicted - width, stride), predicted - width]
    counted_to = 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, len(starts), rows):
        batch = starts[first : first + rows]
        index = torch.tensor(batch, device=device)[:, None] + torch.arange(width, device=device)
        logits = model(input_ids=sequence[index], use_cache=False).logits
        nll = F.cross_entropy(
            logits.float().flatten(0, 1), sequence[index + 1].flatten(), reduction="none"
        ).view(len(batch), width)
        for row, start in zip(nll, batch, strict=True):
            total += row[counted_to - start :].sum(dtype=torch.float64)
            counted_to = start + width
    return float(total) / math.log(2) / num_bytes


def train(
    model: Any,
    rows: Rows,
    *,
    preset: Preset,
    valid: tuple[list[int], int],
    compile_model: bool = False,
) -> list[Checkpoint]:
    """Train ``model`` in place; ``valid`` is its token ids and its size in bytes."""
    device = rows.device
    named = dict(model.named_parameters())
    apart = {n: p for n, p in named.items() if p.ndim < 2 or "layers" not in n}
    muon = Muon([p for n, p in named.items() if n not in apart], weight_decay=preset.weight_decay)
    groups = [
        {
            "params": [p for n, p in apart.items() if key in n],
            "base_lr": lr,
            "weight_decay": decay,
        }
        for key, lr, decay in (
            ("embed_tokens", preset.embedding_lr, preset.weight_decay),
            ("lm_head", preset.head_lr, preset.weight_decay),
            ("norm", preset.norm_lr, 0.0),
        )
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    forward = torch.compile(model) if compile_model else model
    history: list[Checkpoint] = []
    look_every = max(1, preset.steps // 12)
    began, tokens = time.perf_counter(), 0
    for step in range(preset.steps):
        full = step >= preset.full_length_from * preset.steps
        length = preset.max_position_embeddings if full else preset.sequence_length
        batch = rows.next(preset.batch_tokens // length, length)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        factor = learning_rate_factor(step, preset.steps, preset.warmup)
        muon.step(preset.muon_lr * factor)
        for group in adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        tokens += preset.batch_tokens
        done = step + 1
        if done % 100 == 0 or done in (1, preset.steps) or done % look_every == 0:
            line = f"step {done:5}/{preset.steps}  loss {loss.item():.4f}"
            line += f"  {tokens / (time.perf_counter() - began):,.0f} tokens/s"
            if done % look_every == 0 or done == preset.steps:
                with torch.autocast(device.type, torch.bfloat16):
                    bpb = bits_per_byte(model, *valid, window=length, stride=length // 2)
                line += f"  valid {bpb:.4f} bits per byte (windows of {length})"
                looked = Checkpoint(step=done, train_loss=loss.item(), valid_bits_per_byte=bpb)
                history.append(looked)
            print(line, file=sys.stderr, flush=True)
    return history


# Output


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the model, rounded to bfloat16, and its tokenizer; every weight must be finite."""
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} is not finite: training diverged; lower the learning rates")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    names = {"bos_token": BOS, "eos_token": END, "pad_token": END}
    (out / "special_tokens_map.json").write_text(
        json.dumps(names | {"extra_special_tokens": [USER, ASSISTANT]}, indent=2) + "\n",
        encoding="utf-8",
    )
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors leaves its file to the owner alone


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: list[str], *, seed: int, max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Sample a continuation of each rendered prompt: its text, and whether it ended itself."""
    torch.manual_seed(seed)
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    output = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
    )
    found = []
    for row in output[:, width:].tolist():
        ended = tokenizer.eos_token_id in row
        kept = row[: row.index(tokenizer.eos_token_id)] if ended else row
        found.append((tokenizer.decode(kept), ended))
    return found


def render_prompt(tokenizer: Any, message: str) -> str:
    """The chat prompt of one user message, by the tokenizer's own template."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    )


def opening_sentences(text: str, count: int) -> list[str]:
    """First sentences of ``count`` paragraphs spread over ``text``."""
    found = []
    for paragraph in paragraphs(text):
        match = re.match(r"[^.!?]{20,240}[.!?]", paragraph)
        if match:
            found.append(match.group())
    return found[:: max(1, len(found) // count)][:count]


def versions(device: torch.device) -> dict[str, str]:
    """What the run ran on; no names of machines or paths."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# A {parameters_m:.2f} M-parameter Llama
The model that `oomproof` brings along, so that everything can be tried without a download. It
was trained from scratch by `tools/train_tiny.py` (preset `{preset_name}`, seed {seed}) in
{training_s:.0f} s on one {device}. It writes in the voice of its books and knows nothing else:
it does not answer questions, follow instructions or state facts.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: RoPE, RMSNorm, SwiGLU, grouped-query attention, untied head |
| parameters | {parameters:,} in bfloat16 |
| layers, hidden, intermediate | {num_hidden_layers}, {hidden_size}, {intermediate_size} |
| heads | {num_attention_heads} query, {num_key_value_heads} key-value, of {head_dim} |
| context | {max_position_embeddings} tokens (trained at {sequence_length}, and at the full \
length from {full_length_from:.0%} of the steps on) |
| tokenizer | byte-level BPE, {vocab_size} tokens, {bytes_per_token:.2f} bytes to a token |

## Figures
Measured by the run that wrote this card, with the weights as saved (bfloat16). Bits per byte is
-log2 P(text) over the text's UTF-8 bytes, every token counted once, in windows of
{max_position_embeddings} tokens moved by {half_context}.

| | |
|---|---|
| bits per byte, validation | {valid_bits_per_byte:.4f} |
| bits per byte, test (read once, at the end) | {test_bits_per_byte:.4f} |
| sampled answers that end within {chat_stop_tokens} tokens | {chat_stop_rate:.0%} of \
{chat_answers} |
| tokens seen | {tokens_seen:,} (the plain rows pass {plain_epochs:.1f} times over the text) |
| training | {steps:,} steps of {batch_tokens:,} tokens, {training_s:.1f} s |
| versions | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

## Recipe
Muon (Jordan et al. 2024) for the hidden matrices at {muon_lr}, AdamW for embedding
({embedding_lr}), head ({head_lr}) and norms ({norm_lr}); weight decay {weight_decay}; warm-up over
{warmup:.0%} of the steps, then a line to zero; bfloat16 autocast over float32 weights. Of the rows
{chat_fraction:.0%} are chat documents cut from the same text: the user gives the beginning of a
passage, the assistant goes on to the end of a sentence or paragraph and ends with `<|end|>`.

Prompt format: `<|bos|><|user|>It was a dark night<|end|><|assistant|>`; a system message is put as
plain text before the first turn.

## Data
English books in the public domain. The tokenizer was trained on the training text alone.

| file | bytes | sha256 |
|---|---|---|
{files}

## Samples
At the generation config's temperature and top-p, first draw.

{samples}
"""


def quoted(text: str) -> str:
    """``text`` as a Markdown quotation."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def write_card(
    out: Path,
    *,
    name: str,
    seed: int,
    preset: Preset,
    measured: Measured,
    corpora: list[Corpus],
    samples: list[tuple[str, str]],
) -> None:
    """Write README.md and training.json."""
    made_with = versions(torch.device("cuda" if measured.peak_device_bytes else "cpu"))
    sources = [{"name": c.name, "bytes": c.num_bytes, "sha256": c.sha256} for c in corpora]
    shape, figures = dataclasses.asdict(preset), dataclasses.asdict(measured)
    record = {
        "preset": name,
        "seed": seed,
        "recipe": shape,
        "measured": figures,
        "made_with": made_with,
        "corpus": sources,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    card = CARD.format(
        **shape,
        **figures,
        **made_with,
        preset_name=name,
        seed=seed,
        parameters_m=measured.parameters / 1e6,
        half_context=preset.max_position_embeddings // 2,
        files="\n".join(f"| `{c.name}` | {c.num_bytes:,} | `{c.sha256}` |" for c in corpora),
        samples="\n\n".join(f"**{p.strip()}**\n\n{quoted(a)}" for p, a in samples),
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in ``folder``."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def run(
    *,
    corpora: list[Corpus],
    out: Path,
    name: str,
    preset: Preset,
    seed: int,
    device: torch.device,
    compile_model: bool = False,
    chat_answers: int = 64,
) -> Measured:
    """Train on ``corpora`` (train, valid, test) and write the folder ``out``."""
    training, valid, test = corpora
    torch.manual_seed(seed)
    began = time.perf_counter()
    tokenizer = train_tokenizer(training.text, preset.vocab_size, preset.max_position_embeddings)
    if len(tokenizer) != preset.vocab_size:
        raise ValueError(
            f"{training.name} gives {len(tokenizer)} tokens, not {preset.vocab_size}: "
            "use a longer text or a smaller vocab_size"
        )
    rows = Rows(tokenizer, training.text, preset=preset, seed=seed, device=device)
    tokenizer_s = time.perf_counter() - began
    model = build_model(preset).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{name}: {parameters:,} parameters; {len(rows.plain):,} plain tokens "
        f"({training.num_bytes / len(rows.plain):.3f} bytes each), {len(rows.chat):,} chat tokens "
        f"in {len(rows.chat_starts):,} documents; {tokenizer_s:.1f} s so far",
        file=sys.stderr,
    )
    began = time.perf_counter()
    valid_ids = encode(tokenizer, [valid.text])[0]
    history = train(
        model,
        rows,
        preset=preset,
        valid=(valid_ids, valid.num_bytes),
        compile_model=compile_model,
    )
    training_s = time.perf_counter() - began
    save(model, tokenizer, out)

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").to(device).eval()
    window = preset.max_position_embeddings
    bpb = {}
    for corpus in (valid, test):
        ids = encode(tokenizer, [corpus.text])[0]
        if tokenizer.decode(ids) != corpus.text:
            raise ValueError(f"{corpus.name} does not come back from the tokenizer unchanged")
        bpb[corpus] = bits_per_byte(model, ids, corpus.num_bytes, window=window, stride=window // 2)
    max_new_tokens = min(256, window // 2)
    asked = [render_prompt(tokenizer, s) for s in opening_sentences(valid.text, chat_answers)]
    replies = answers(model, tokenizer, asked, seed=seed, max_new_tokens=max_new_tokens)
    prompts = [BOS + p for p in RAW_PROMPTS] + [render_prompt(tokenizer, p) for p in CHAT_PROMPTS]
    shown = answers(model, tokenizer, prompts, seed=seed, max_new_tokens=max_new_tokens)
    for prompt, (text, ended) in zip(prompts, shown, strict=True):
        print(f"=== {prompt}\n{text}{END if ended else ' [cut]'}\n")
    measured = Measured(
        parameters=parameters,
        bytes_per_token=training.num_bytes / (len(rows.plain) - 1),
        train_tokens=len(rows.plain) - 1,
        tokens_seen=preset.steps * preset.batch_tokens,
        plain_epochs=rows.plain_rows_tokens / len(rows.plain),
        valid_bits_per_byte=bpb[valid],
        test_bits_per_byte=bpb[test],
        chat_stop_rate=sum(ended for _, ended in replies) / max(1, len(replies)),
        chat_stop_tokens=max_new_tokens,
        chat_answers=len(replies),
        tokenizer_s=tokenizer_s,
        training_s=training_s,
        peak_device_bytes=(
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ),
        history=history,
    )
    samples = [(p, shown[len(RAW_PROMPTS) + i][0]) for i, p in enumerate(CHAT_PROMPTS)]
    write_card(
        out,
        name=name,
        seed=seed,
        preset=preset,
        measured=measured,
        corpora=corpora,
        samples=samples,
    )
    size = folder_bytes(out)
    print(
        f"valid {bpb[valid]:.4f}, test {bpb[test]:.4f} bits per byte; {size:,} bytes in all; "
        f"{measured.chat_stop_rate:.0%} of {len(replies)} answers end; {training_s:.1f} s"
    )
    if preset.max_folder_bytes is not None and size > preset.max_folder_bytes:
        raise ValueError(
            f"the folder is {size:,} bytes, over {preset.max_folder_bytes:,}: "
            "make the preset's shape smaller"
        )
    return measured


def changed(preset: Preset, settings: list[str]) -> Preset:
    """``preset`` with each ``field=value`` of ``settings`` put in."""
    values: dict[str, Any] = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        if field not in {f.name for f in dataclasses.fields(Preset)}:
            raise ValueError(f"--set {setting}: a preset has no field {field!r}")
        values[field] = type(getattr(preset, field))(value)
    return dataclasses.replace(preset, **values)


def main() -> None:
    """Read the command line and run."""
    summary = "Train the bundled model; the top of this file says how."
    parser = argparse.ArgumentParser(description=summary)
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}", type=Path, required=True, help=f"{split} text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="instead of the preset's, for a smoke run")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = parser.parse_args()
    settings = [*options.set, *([f"steps={options.steps}"] if options.steps else [])]
    # cuBLAS is deterministic with a workspace of its own; read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory only helps to find reads of it, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    run(
        corpora=[Corpus.read(path) for path in (options.train, options.valid, options.test)],
        out=options.out,
        name=options.preset,
        preset=changed(PRESETS[options.preset], settings),
        seed=options.seed,
        device=torch.device(options.device),
        compile_model=options.compile,
    )


if __name__ == "__main__":
    main()
