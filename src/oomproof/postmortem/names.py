"""Names of models and GPUs that a log mentions, as far as they can be told from other words."""

from __future__ import annotations

import re

_MAX_NAMES = 16
_NAME = r"([A-Za-z0-9~./][\w.~/\\:-]{0,200})"
_MODEL_WORDS = (
    *("from_pretrained(", "--model", "model=", "model =", 'model"', "model'", "model_", "models--"),
    *("base_model", "checkpoint=", "checkpoint =", "repo_id", "vllm serve", "huggingface.co/"),
    "oomproof ",
)
_MODELS = (
    re.compile(rf"from_pretrained\(\s*[rf]?[\"']{_NAME}[\"']"),
    re.compile(rf"--model(?:[-_](?:name(?:[-_]or[-_]path)?|path|id))?(?:=|\s+)[\"']?{_NAME}[\"']?"),
    re.compile(
        r"\b(?:model|model_id|model_name|model_path|model_name_or_path|pretrained_model_name_or_path"
        rf"|checkpoint|base_model|repo_id)[\"']?\s*[=:]\s*[rf]?[\"']{_NAME}[\"']"
    ),
    re.compile(rf"\bvllm serve\s+[\"']?{_NAME}"),
    re.compile(rf"\boomproof (?:plan|run|chat|rehearse|bench)\s+[\"']?{_NAME}"),
    re.compile(r"\bmodel='([\w./~-]{1,200})'"),
)
_CACHED = re.compile(r"\bmodels--([A-Za-z0-9][\w.-]{0,96}?)--([A-Za-z0-9][\w.-]{0,96})")
_LINKED = re.compile(
    r"huggingface\.co/([A-Za-z0-9][\w.-]{0,96}/[A-Za-z0-9][\w.-]{0,96})/(?:resolve|blob|tree)/"
)
_WEIGHTS = re.compile(r"/(?:[\w.-]{1,200}\.(?:safetensors|bin|json|index|gguf))$")
_CARDS = re.compile(
    r"\b(?:NVIDIA|GeForce|Tesla|Quadro|RTX|GTX|Radeon|Instinct|Apple M[1-9])"
    r"(?: [A-Z0-9][\w-]{0,20}){1,5}"
)
_CARD_WORDS = ("NVIDIA", "GeForce", "Tesla", "Quadro", "RTX", "GTX", "Radeon", "Instinct", "Apple")
_COUNT_WORDS = ("tensor-parallel-size", "tensor_parallel_size", "CUDA_VISIBLE_DEVICES")
NAME_WORDS = (*_MODEL_WORDS, *_CARD_WORDS, *_COUNT_WORDS)
"""One of them is in every line that has a name."""
_COUNTS = (
    re.compile(r"--tensor-parallel-size(?:=|\s+)([0-9]{1,2})\b"),
    re.compile(r"\btensor_parallel_size\s?=\s?([0-9]{1,2})\b"),
)
_VISIBLE = re.compile(r"\bCUDA_VISIBLE_DEVICES=[\"']?([0-9]{1,3}(?:,[0-9]{1,3}){0,63})")


class NamesFound:
    """Collects the first of them, line by line."""

    def __init__(self) -> None:
        self._models: dict[str, None] = {}
        self._accelerators: dict[str, None] = {}
        self.num_gpus = 1

    @property
    def models(self) -> tuple[str, ...]:
        """As they are written, each once."""
        return tuple(self._models)

    @property
    def accelerators(self) -> tuple[str, ...]:
        """Words that may begin with the name of one."""
        return tuple(self._accelerators)

    def feed(self, line: str) -> None:
        """Takes the next line."""
        if len(self._models) < _MAX_NAMES and any(word in line for word in _MODEL_WORDS):
            for name in _models_of(line):
                self._models.setdefault(name)
        if len(self._accelerators) < _MAX_NAMES and any(word in line for word in _CARD_WORDS):
            for found in _CARDS.finditer(line):
                self._accelerators.setdefault(found[0].strip())
        if any(word in line for word in _COUNT_WORDS):
            for pattern in _COUNTS:
                if counted := pattern.search(line):
                    self.num_gpus = max(self.num_gpus, int(counted[1]))
            if visible := _VISIBLE.search(line):
                self.num_gpus = max(self.num_gpus, visible[1].count(",") + 1)


def _models_of(line: str) -> list[str]:
    names = [f"{found[1]}/{found[2]}" for found in _CACHED.finditer(line)]
    names += [found[1] for found in _LINKED.finditer(line)]
    for pattern in _MODELS:
        names += [found[1] for found in pattern.finditer(line)]
    return [short for name in names if (short := _WEIGHTS.sub("", name).rstrip("/.,:\\"))]
