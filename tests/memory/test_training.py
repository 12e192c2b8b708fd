"""What training takes: sums of shapes, and what is spent on activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oomproof.errors import InputError, PlanDoesNotFitError
from oomproof.formats import DType
from oomproof.memory.sharding import cut_layers
from oomproof.memory.training import host_bytes, kept_within, training_memory
from oomproof.memory.training_buffers import (
    PHASES,
    allocated,
    loss_tokens,
    phase_buffers,
    scratch_bytes,
    workspace_bytes,
)
from oomproof.memory.training_shape import (
    Kept,
    TrainingShape,
    adapter_numel,
    adapter_shapes,
    linear_shapes,
)
from oomproof.models.catalog import find
from oomproof.models.spec import ModelSpec

GB = 10**9


def spec_of(name: str) -> ModelSpec:
    found = find(name)
    assert found is not None
    return found.spec()


EIGHT = spec_of("llama-3.1-8b")
SHAPE = TrainingShape(tokens=2048, positions=2048, kept=Kept(attention=32))


def test_adapters_of_an_8b_have_the_numbers_that_peft_counts() -> None:
    # r × (rows + columns) of seven linears.
    assert 32 * adapter_numel(EIGHT, 16, SHAPE.targets) == 41_943_040
    assert linear_shapes(EIGHT)["mlp.down_proj"] == (4096, 14336)
    assert adapter_numel(EIGHT, 8, ("q_proj", "v_proj")) == 8 * (8192 + 5120)


@pytest.mark.parametrize(
    ("batch", "sequence", "limit"), [(1, 2048, 9 * GB), (4, 2048, 13 * GB), (1, 8192, 13 * GB)]
)
def test_an_8b_trains_within_the_memory_that_is_promised(
    batch: int, sequence: int, limit: int
) -> None:
    shape = TrainingShape(tokens=batch * sequence, positions=sequence, sequences=batch)
    found = kept_within(EIGHT, shape, limit)
    assert found.kept.attention == 32
    assert limit - GB < training_memory(EIGHT, found).peak_bytes <= limit


def test_a_70b_trains_within_48_gb() -> None:
    shape = TrainingShape(tokens=2048, positions=2048, sequences=1)
    spec = spec_of("llama-3.1-70b")
    assert training_memory(spec, kept_within(spec, shape, 48 * GB)).peak_bytes <= 48 * GB


def test_the_terms_of_an_8b_are_sums_of_shapes() -> None:
    terms = training_memory(EIGHT, SHAPE)
    assert terms.adapters == terms.gradients == 4 * 41_943_040
    assert terms.checkpoints == 32 * 2048 * 4096 * 2
    assert terms.kept == 32 * 2048 * (4096 * 2 + 32 * 4)
    assert terms.scratch == 28672 * 4096 * 2
    assert terms.optimizer == pytest.approx(8 * 41_943_040, rel=0.01)
    assert training_memory(EIGHT, SHAPE, optimizer="adamw-8bit").optimizer < terms.optimizer / 3
    # Only what is small stays on the device.
    paged = training_memory(EIGHT, SHAPE, optimizer="adamw-paged").optimizer
    assert 40_000_000 < paged < 50_000_000
    assert training_memory(EIGHT, SHAPE, optimizer="none").optimizer == 0
    names = {buffer.name: buffer for buffer in phase_buffers(EIGHT, SHAPE, "backward.mlp")}
    assert names["gate_up"].shape == (2048, 28672)
    assert terms.workspace == workspace_bytes(EIGHT, SHAPE)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-paged"])
@pytest.mark.parametrize("rank", [1, 16])
def test_an_optimizer_holds_what_its_library_makes(optimizer: str, rank: int) -> None:
    shape = replace(SHAPE, rank=rank)
    shapes = adapter_shapes(EIGHT, rank, shape.targets).values()
    parameters = [
        torch.nn.Parameter(torch.empty(one, device="meta")) for pair in shapes for one in pair
    ]
    sizes = {}
    if optimizer == "adamw":
        for number, parameter in enumerate(parameters):
            sizes[number] = [4 * parameter.numel(), 4 * parameter.numel(), 4]
        shared = 0
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        made = bitsandbytes.optim.AdamW8bit(parameters)
        made.check_overrides()
        [group] = made.param_groups
        for number, parameter in enumerate(parameters):
            made.init_state(group, parameter, 0, number)
            sizes[number] = [
                one.nbytes
                for name, one in made.state[parameter].items()
                if isinstance(one, torch.Tensor)
                and not name.startswith("qmap")
                # What bitsandbytes.optim.optimizer.get_state_buffer asks F.get_paged for.
                and not (optimizer == "adamw-paged" and one.numel() == parameter.numel() >= 100_000)
            ]
        shared = sum(allocated(one.nbytes) for one in made.name2qmap.values())
    each = sum(allocated(size) for listed in sizes.values() for size in listed)
    assert training_memory(EIGHT, shape, optimizer=optimizer).optimizer == 32 * each + shared


def test_every_option_that_spares_memory_does() -> None:
    peak = training_memory(EIGHT, SHAPE).peak_bytes
    for change in (
        {"kept": Kept()},
        {"offload_checkpoints": True},
        {"scratch_bytes": 1 << 26},
        {"tokens": 1024},
        {"rank": 8},
        {"targets": ("q_proj",)},
    ):
        fewer = replace(SHAPE, **change)
        assert training_memory(EIGHT, fewer).peak_bytes < peak, change
    long = replace(SHAPE, tokens=8192)
    more = training_memory(EIGHT, replace(long, dropout=True)).peak_bytes
    assert more > training_memory(EIGHT, long).peak_bytes


def test_more_is_kept_the_more_there_is() -> None:
    nothing = training_memory(EIGHT, replace(SHAPE, kept=Kept())).peak_bytes
    counts = []
    for limit in range(nothing, nothing + 8 * GB, GB // 2):
        shape = kept_within(EIGHT, SHAPE, limit)
        assert training_memory(EIGHT, shape).peak_bytes <= limit
        counts.append(sum(getattr(shape.kept, name) for name in Kept.__slots__))
    assert counts == sorted(counts)
    assert counts[-1] == 4 * 32


def test_a_step_that_does_not_fit_is_refused_by_the_bytes_that_are_missing() -> None:
    nothing = training_memory(EIGHT, replace(SHAPE, kept=Kept())).peak_bytes
    with pytest.raises(PlanDoesNotFitError, match="the limit is") as caught:
        kept_within(EIGHT, SHAPE, nothing - 5)
    assert caught.value.shortfall_bytes == 5


def test_logits_exist_for_few_tokens_at_a_time() -> None:
    assert loss_tokens(EIGHT, SHAPE) == 1024
    assert loss_tokens(EIGHT, replace(SHAPE, tokens=100)) == 100
    assert loss_tokens(EIGHT, replace(SHAPE, loss_tokens=300)) == 300
    assert loss_tokens(EIGHT, replace(SHAPE, compute_dtype=DType.FLOAT32)) == 512


def test_scratch_holds_a_projection_or_slices_of_it() -> None:
    assert scratch_bytes(EIGHT, SHAPE) == 28672 * 4096 * 2
    assert scratch_bytes(EIGHT, replace(SHAPE, scratch_bytes=1)) == 128 * 14336 * 2
    assert scratch_bytes(EIGHT, replace(SHAPE, format="bf16")) == 0


def test_offloaded_checkpoints_take_host_memory() -> None:
    assert host_bytes(EIGHT, SHAPE) == 0
    assert host_bytes(EIGHT, replace(SHAPE, offload_checkpoints=True)) == 1 << 29


def test_what_cannot_be_is_refused() -> None:
    for change in (
        {"tokens": 0},
        {"rank": 0},
        {"ranks": 0},
        {"targets": ()},
        {"targets": ("lm_head",)},
    ):
        with pytest.raises(InputError):
            replace(SHAPE, **change)
    with pytest.raises(InputError, match="adam"):
        training_memory(EIGHT, SHAPE, optimizer="adam")
    with pytest.raises(ValueError, match="no phase"):
        phase_buffers(EIGHT, SHAPE, "sleep")
    assert len(set(PHASES)) == 5


def test_ranks_that_share_a_base_hold_a_part_of_each_layer() -> None:
    spec = spec_of("llama-3.1-70b")
    shape = TrainingShape(tokens=2048, positions=2048, sequences=1)
    alone = training_memory(spec, shape)
    assert alone.gathered == alone.comm == 0
    assert alone.allocated_bytes == alone.peak_bytes
    ends = sum(tensor.numel for tensor in spec.tensors if tensor.layer is None) * 2
    layers = alone.weights - ends
    norms = spec.num_hidden_layers * spec.hidden_size * 2  # whole on each
    for ranks in (2, 3, 8):
        shared = training_memory(spec, replace(shape, ranks=ranks, sharded=True))
        part = shared.weights - ends - norms
        assert layers / ranks <= part < layers / ranks + 80 * 256
        # Two whole layers, one at work and one on its way.
        assert shared.gathered == 2 * ranks * part // 80
        assert shared.comm > 0
        assert shared.allocated_bytes == shared.peak_bytes - shared.comm
    together = training_memory(spec, replace(shape, ranks=2))
    assert together.peak_bytes == alone.peak_bytes + together.comm
    one = replace(shape, ranks=1, sharded=True)
    assert training_memory(spec, one) == alone


def test_a_70b_that_two_ranks_share_trains_on_gpus_of_32_gb() -> None:
    spec = spec_of("llama-3.1-70b")
    shape = TrainingShape(tokens=2048, positions=2048, sequences=1, ranks=2, sharded=True)
    assert training_memory(spec, kept_within(spec, shape, 32 * GB)).peak_bytes <= 32 * GB
    with pytest.raises(PlanDoesNotFitError, match="or share the layers"):
        kept_within(spec, replace(shape, sharded=False), 32 * GB)


def test_layers_are_cut_by_the_largest_in_whole_alignments() -> None:
    cut = cut_layers([1000, 5000, 300], 3)
    assert cut.part_bytes == 1792
    assert cut.gathered_bytes == 3 * 1792
    assert cut.parts_bytes == 3 * 1792
    assert cut.buffers_bytes == 2 * 3 * 1792
