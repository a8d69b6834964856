"""What a traced step says, against real tensors, against counts by hand, and against itself."""

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tiny_random import NUM_QUERIES, RESOLUTION, VOCABULARY, tiny_config, token_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Sam3Config

from helpers.adapters import add_lora
from helpers.config import load_config
from helpers.gpu_rules import as_on_gpu
from helpers.losses import sam3_losses
from helpers.paths import CONFIGS, ROOT
from helpers.prompted_sam3 import PromptedSam3, checkpoint_activations, loss_inputs
from helpers.sam3 import base_dtype
from helpers.step_counter import StepCounter
from helpers.step_trace import StepLoad, StepTracer

LOAD = StepLoad(images=1, prompts=3, objects=(2,))
VISION_ONLY = ("lora.apply_to_text_encoder=false", "lora.apply_to_mask_decoder=false")
VISION_FROZEN = ("lora.apply_to_vision_encoder=false",)
CHECKPOINTING = ("training.gradient_checkpointing=true",)
HALF = ("training.mixed_precision=bf16",)


def run_config(*overrides):
    return load_config(
        CONFIGS / "crack_detection_config.yaml",
        profile="tiny",
        overrides=(f"model.resolution={RESOLUTION}", *overrides),
    )


def wider_config(num_vision_layers=2):
    """Return the tiny shape with a vision encoder that is most of the work."""
    shape = tiny_config()
    backbone = shape.vision_config.backbone_config
    backbone.hidden_size, backbone.intermediate_size = 128, 512
    backbone.num_hidden_layers = num_vision_layers
    return shape


@cache
def tracer(*overrides, as_gpu=True, num_vision_layers=2):
    return StepTracer(wider_config(num_vision_layers), run_config(*overrides), as_gpu=as_gpu)


@cache
def traced(*overrides, load=LOAD, **options):
    return tracer(*overrides, **options).trace(load)


def real_step(*overrides, shape=None, place="cpu"):
    """Run a step on real tensors, with the real loss; return its counter, bytes kept and moments."""
    torch.manual_seed(0)
    config = run_config(*overrides)
    model = PromptedSam3(wider_config() if shape is None else shape)
    for encoder in (model.vision_encoder, model.text_encoder):
        encoder.to(base_dtype(config.training.mixed_precision))
    peft_model = add_lora(model, config.lora).train().to(place)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    trained = [one for one in peft_model.parameters() if one.requires_grad]
    for one in trained:
        one.grad = torch.zeros_like(one)
    side = model.mask_size
    targets = [
        {"boxes_cxcywh": torch.full((n, 4), 0.5), "masks": torch.ones(n, side, side).byte()}
        for n in (2, 0, 0)
    ]
    counter = StepCounter()
    counter.add((*peft_model.parameters(), *peft_model.buffers(), *(one.grad for one in trained)))
    resident = counter.now_bytes
    with counter:
        inputs = token_inputs(VOCABULARY[3:6]) | {"image_index": torch.zeros(3, dtype=torch.long)}
        inputs["pixel_values"] = torch.rand(1, 3, model.resolution, model.resolution)
        outputs = peft_model(**{name: one.to(place) for name, one in inputs.items()})
        loss = sam3_losses(loss_inputs(outputs), targets)["total"]
        del outputs, inputs
        kept = counter.now_bytes - resident
        loss.backward()
    return counter, kept, 2 * sum(one.nbytes for one in trained)


def test_counter_by_hand():
    with StepCounter() as counter:
        first = torch.zeros(1000)
        assert counter.now_bytes == 4000
        view = first.view(10, 100)
        second = view + 1
        assert (counter.now_bytes, counter.peak_bytes) == (8000, 8000)
        del second
        product = view @ torch.zeros(100, 7)
        del first
    assert product.shape == (10, 7)
    assert counter.flops == 2 * 10 * 100 * 7
    assert counter.peak_bytes == 8000  # the product and its factor are smaller than what was freed
    assert counter.now_bytes == 4000 + 4 * 70  # the view keeps its storage
    assert StepCounter(512).now_bytes == 0


def test_counter_rounds_up_to_blocks():
    counter = StepCounter(block_bytes=512)
    tensor = torch.zeros(129)
    counter.add([tensor, tensor[:5]])
    assert counter.now_bytes == 1024


PEAK_OF_A_CHAIN = """
import resource, torch
from helpers.step_counter import StepCounter

def run(rows):
    hidden = torch.ones(rows, 64, requires_grad=True)
    for _ in range(4):
        hidden = torch.tanh(hidden * 0.5)
    (hidden * hidden).sum().backward()

with StepCounter():
    run(10)  # loads what a first pass loads
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with StepCounter() as counter:
    run(400_000)
print(counter.peak_bytes, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_counter_sees_what_the_system_sees():
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_CHAIN],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory goes back at once
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    counted, resident = map(int, done.stdout.split())
    assert counted > 4e8
    assert counted == pytest.approx(resident, rel=0.05)


@pytest.mark.parametrize("overrides", [(), CHECKPOINTING, VISION_FROZEN])
def test_equals_a_real_step_on_the_cpu(overrides):
    counter, kept, moments = real_step(*overrides)
    step = traced(*overrides, as_gpu=False)
    assert step.kept_bytes == pytest.approx(kept, rel=0.02)
    assert step.peak_bytes == pytest.approx(counter.peak_bytes + moments, rel=0.001)
    assert step.step_flops == counter.flops


def test_weights_adapters_and_optimizer_by_hand():
    model = PromptedSam3(wider_config())
    encoders = [*model.vision_encoder.parameters(), *model.text_encoder.parameters()]
    in_encoders = sum(one.numel() for one in encoders)
    in_all = sum(one.numel() for one in model.parameters())
    buffers = sum(one.nbytes for one in model.buffers())
    step = traced(*HALF, as_gpu=False)
    assert step.base_bytes == pytest.approx(4 * in_all - 2 * in_encoders + buffers, abs=2000)
    lora = add_lora(model, run_config().lora)
    num_trained = sum(one.numel() for one in lora.parameters() if one.requires_grad)
    assert step.adapter_bytes == 4 * 4 * num_trained


def test_float16_leaves_the_base_in_float32():
    single, half = traced(), traced("training.mixed_precision=fp16")
    assert half.base_bytes == single.base_bytes > traced(*HALF).base_bytes


def test_full_size_has_its_weights():
    model = StepTracer(Sam3Config(), load_config(CONFIGS / "full_lora_config.yaml")).model
    frozen = [one for one in model.parameters() if not one.requires_grad]
    assert sum(one.numel() for one in frozen) == 840_376_374
    assert sum(one.nbytes for one in frozen) / 2**30 == pytest.approx(1.63, abs=0.01)


@pytest.mark.parametrize("overrides", [HALF, (*HALF, *CHECKPOINTING)])
def test_grows_in_a_line_with_images_and_prompts(overrides):
    def steps(loads):
        return [traced(*overrides, load=load) for load in loads]

    images = steps(StepLoad(n, 4 * n, (2,) * n) for n in (1, 2, 4))
    prompts = steps(StepLoad(1, n, (2,)) for n in (2, 3, 5))
    for (one, two, last), more in ((images, 2), (prompts, 2)):
        for name in ("peak_bytes", "kept_bytes"):
            low, high, measured = (getattr(step, name) for step in (one, two, last))
            assert low + (1 + more) * (high - low) == pytest.approx(measured, rel=0.005)
        for name in ("forward_flops", "step_flops"):
            low, high, measured = (getattr(step, name) for step in (one, two, last))
            assert low + (1 + more) * (high - low) == measured


def test_frozen_vision_encoder_keeps_nothing():
    def kept(*overrides):
        return [traced(*overrides, num_vision_layers=n).kept_bytes for n in (2, 6)]

    adapted = kept(*VISION_ONLY)
    assert adapted[1] > 1.5 * adapted[0]
    frozen = kept(*VISION_FROZEN)
    assert frozen[0] == frozen[1]


def test_feature_cache_leaves_out_the_backbone():
    cached = (*VISION_FROZEN, "training.feature_cache=cache")
    without, with_cache = (
        [traced(*overrides, num_vision_layers=n) for n in (2, 6)]
        for overrides in (VISION_FROZEN, cached)
    )
    two_layers = (without[1].forward_flops - without[0].forward_flops) / 2
    assert without[0].forward_flops - with_cache[0].forward_flops > two_layers > 0
    assert with_cache[0].forward_flops == with_cache[1].forward_flops
    assert with_cache[0].kept_bytes == with_cache[1].kept_bytes


def test_checkpointing_trades_time_for_memory():
    without, checkpointed = traced(*HALF), traced(*HALF, *CHECKPOINTING)
    assert checkpointed.peak_bytes < without.peak_bytes
    assert checkpointed.forward_flops == without.forward_flops
    again = checkpointed.step_flops - without.step_flops
    assert 0 < again < without.forward_flops


def test_objects_and_none():
    empty = traced(load=StepLoad(1, 3, ()))
    assert empty.peak_bytes > 0
    many = traced(load=StepLoad(1, 3, (3 * NUM_QUERIES,)))
    assert many.peak_bytes >= empty.peak_bytes


def test_leaves_no_trace_behind():
    torch.manual_seed(0)
    model = PromptedSam3(tiny_config()).eval()
    inputs = token_inputs(["crack"]) | {"pixel_values": torch.rand(1, 3, RESOLUTION, RESOLUTION)}
    functions = F.layer_norm, F.dropout, F.scaled_dot_product_attention
    StepTracer(tiny_config(), run_config()).trace(LOAD)
    assert (F.layer_norm, F.dropout, F.scaled_dot_product_attention) == functions
    with torch.no_grad():
        masks = model(**inputs)["pred_masks"]  # would mix with what the trace left in a cache
    assert type(masks) is torch.Tensor


class Layer(torch.nn.Module):
    """One of each kind of function for which a GPU has its own rule, but attention."""

    def __init__(self):
        super().__init__()
        self.norm, self.groups = torch.nn.LayerNorm(64), torch.nn.GroupNorm(4, 64)
        self.linear, self.dropout = torch.nn.Linear(64, 64), torch.nn.Dropout(0.1)

    def forward(self, tokens):
        hidden = self.dropout(self.linear(self.norm(tokens)) + tokens)
        grid = self.groups(hidden.transpose(1, 2).reshape(-1, 64, 5, 10))
        return [hidden, F.interpolate(grid, scale_factor=2, mode="nearest")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_keep_what_a_gpu_keeps(monkeypatch, dtype):
    """Tensors that claim to be on a GPU get torch's own autocast and dropout of a GPU."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch was built without CUDA")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    kept = {}
    for place, rules in (("cuda", nullcontext()), ("cpu", as_on_gpu()), ("neither", nullcontext())):
        device = "cpu" if place == "neither" else place
        layer = Layer().to(dtype)
        with rules, FakeTensorMode():
            layer._apply(
                lambda one, device=device: torch.empty(one.shape, dtype=one.dtype, device=device)
            )
            tokens = torch.empty(2, 50, 64, dtype=dtype, device=device)
            counter = StepCounter(512)
            with counter, torch.autocast(device, torch.bfloat16):
                outputs = layer(tokens)
        kept[place] = counter.now_bytes, [one.dtype for one in outputs]
    assert kept["cuda"] == kept["cpu"]
    assert kept["neither"][0] != kept["cpu"][0]


@pytest.mark.full_size
@pytest.mark.parametrize("overrides", [CHECKPOINTING, VISION_FROZEN])
def test_predicts_the_peak_of_a_gpu(overrides):
    """Random weights of the full shape; small models drown in the workspaces of the kernels."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU to measure on")
    overrides = (*HALF, *overrides, "model.resolution=1008")
    real_step(*overrides, shape=Sam3Config(), place="cuda")  # makes workspaces that stay
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, _, moments = real_step(*overrides, shape=Sam3Config(), place="cuda")
    peak = torch.cuda.max_memory_allocated() - before + moments
    predicted = StepTracer(Sam3Config(), run_config(*overrides)).trace(LOAD).peak_bytes
    assert predicted == pytest.approx(peak, rel=0.1)
