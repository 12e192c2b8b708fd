"""Training on transformers and peft: the way of every architecture that our own core does not have.

The base is loaded by our plan and loader (compat/model.py), 4-bit linears are bitsandbytes'. The
loss is computed in chunks of positions, so that logits of the whole sequence never exist, wherever
the model's logits are its head's output alone or soft-capped; elsewhere they are whole.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from oomproof.errors import CheckpointError, InputError, NotRunnableError
from oomproof.memory.peft import LOSS_POSITIONS, SCALED_LOGITS
from oomproof.tuning.options import ALL_LINEARS, AdapterSettings

IGNORED = -100
CHUNK_POSITIONS = LOSS_POSITIONS


@dataclass(frozen=True, slots=True)
class Loss:
    """A forward pass's result."""

    loss: torch.Tensor


class PeftTrainingModel(torch.nn.Module):
    """A transformers model with a LoRA adapter, as `tuning.protocol.TrainingModel`.

    Args:
        model: The loaded base; it is changed in place.
        adapter: What to add.
        base_id: What the adapter's config calls the base: a hub id, or a folder.
        revision: Its commit.
        checkpointing: "none", "layers" or "offload".
        seed: Of the adapter's first values.

    Raises:
        InputError: The adapter names modules that the model has not.
        NotRunnableError: Its inputs of layers cannot be kept on the host by this transformers.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        model: Any,
        adapter: AdapterSettings,
        *,
        base_id: str,
        revision: str | None = None,
        checkpointing: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        import peft

        targets: Any = list(adapter.target_modules)
        if targets == [ALL_LINEARS]:
            targets = ALL_LINEARS
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=cast("int", adapter.alpha),
            lora_dropout=adapter.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_id,
            revision=revision,
        )
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.peft = peft.get_peft_model(model, config)
        except ValueError as error:
            raise InputError(
                f"no adapter can be added: {str(error).splitlines()[0][:200]}",
                remedy="see --target-modules",
            ) from None
        self.peft.peft_config["default"].base_model_name_or_path = base_id
        self.config = model.config
        model.config.use_cache = False
        self.chunked_loss = not any(getattr(self.config, name, None) for name in SCALED_LOGITS)
        self._keep_training = [one for one in self.modules() if _is_bitsandbytes(one)]
        if checkpointing != "none":
            _recompute_layers(model, offload=checkpointing == "offload")
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def train(self, mode: bool = True) -> PeftTrainingModel:
        """As torch's; bitsandbytes' layers stay as they are.

        On processors they would repack their weights for good at the first evaluation, in a form
        that gradients cannot pass.
        """
        super().train(mode)
        for module in self._keep_training:
            module.training = True
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> Loss:
        """See tuning.protocol.TrainingModel."""
        wanted = labels[:, 1:].reshape(-1)
        places = torch.nonzero(wanted != IGNORED).squeeze(1)
        wanted = wanted[places]
        base = self.peft.get_base_model()
        if self.chunked_loss:
            states = base.get_decoder()(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            # [positions that are learned, hidden]
            states = states[:, :-1].reshape(-1, states.shape[-1])[places]
            total = torch.zeros((), dtype=torch.float32, device=states.device)
            for first in range(0, len(places), CHUNK_POSITIONS):
                part = slice(first, first + CHUNK_POSITIONS)
                total = total + checkpoint(
                    self._chunk_loss, states[part], wanted[part], use_reentrant=False
                )
        else:
            logits = base(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            logits = logits[:, :-1].reshape(-1, logits.shape[-1])[places]
            total = functional.cross_entropy(logits.float(), wanted, reduction="sum")
        count = len(places) if num_items_in_batch is None else num_items_in_batch
        return Loss(loss=total / count)

    def save_adapter(self, folder: Path) -> None:
        """See tuning.protocol.TrainingModel."""
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    def load_adapter(self, folder: Path) -> None:
        """See tuning.protocol.TrainingModel.

        Raises:
            CheckpointError: The folder's values are not this adapter's.
        """
        import peft
        from safetensors.torch import load_file

        file = folder / "adapter_model.safetensors"
        found = peft.set_peft_model_state_dict(self.peft, load_file(file))
        missing = [name for name in found.missing_keys if "lora_" in name]
        if missing or found.unexpected_keys:
            raise CheckpointError(
                str(file),
                f"is another adapter: {len(missing)} values are missing, "
                f"{len(found.unexpected_keys)} are unknown",
            )

    def _chunk_loss(self, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        base = self.peft.get_base_model()
        logits = base.get_output_embeddings()(states).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return functional.cross_entropy(logits, wanted, reduction="sum")


def _is_bitsandbytes(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


@torch.no_grad()
def _recompute_layers(model: Any, *, offload: bool) -> None:
    """Keep the inputs of layers alone, on the host where asked; the rest is computed again."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # transformers before 5.23 has it under its older name
        enable = model.gradient_checkpointing_enable
    if not offload:
        enable({"use_reentrant": False})
        return
    if "offload" not in inspect.signature(enable).parameters:
        version = importlib.metadata.version("transformers")
        raise NotRunnableError(
            f"transformers {version} cannot keep inputs of layers on the host",
            remedy='pip install "transformers>=5.17,<6", or use --checkpointing layers',
        )
    enable({"use_reentrant": False}, offload=True)


def refuse_leaking_packs(model: PeftTrainingModel, vocab_size: int, device: torch.device) -> None:
    """Checks that documents of one sequence do not see each other.

    Raises:
        NotRunnableError: This architecture's attention does not keep them apart.
    """
    tokens = torch.arange(2, 34, device=device).remainder(vocab_size)[None]
    positions = torch.arange(16, device=device).repeat(2)[None]
    labels = tokens.clone()
    labels[:, :17] = IGNORED
    other = tokens.clone()
    other[:, :16] = tokens[:, :16].flip(1)
    was = model.training
    model.eval()
    with torch.no_grad():
        first, second = (
            float(model(one, labels, position_ids=positions).loss) for one in (tokens, other)
        )
    model.train(was)
    if abs(first - second) > 1e-3 * max(1.0, abs(first)):
        raise NotRunnableError(
            "this architecture's attention does not keep packed documents apart "
            f"(loss {first:.4f} behind one document, {second:.4f} behind another)",
            remedy="use --no-packing",
        )
