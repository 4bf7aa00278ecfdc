"""On an NVIDIA GPU: logits of the recordings, attention kernels, compiled decoding. Skipped where there is none."""

import pytest
import torch
from conftest import recorded_image, relative_error
from test_finetuning import example
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, StaticCache
from transformers.utils import is_flash_attn_2_available

from benchmarks.workloads import compile_decoder
from navil.modeling_navil import (
    Segments,
    segment_attention_flash,
    segment_attention_function,
    segment_attention_sdpa,
    segment_attention_varlen,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BFLOAT16_ERROR = 0.05  # of the largest logit, against float32 on the CPU


@pytest.fixture
def on_cuda(recording):
    model = AutoModel.from_pretrained(recording.folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    return model.eval().to("cuda")


@pytest.mark.parametrize("case", ["single", "two_images", "text_only", "multi_turn"])
def test_bfloat16_logits_agree_with_the_recording(recording, on_cuda, case):
    inputs = {name: tensor.cuda() for name, tensor in recording.inputs(case).items()}
    with torch.no_grad():
        logits = on_cuda(**inputs).logits
    assert relative_error(logits.cpu(), recording.tensors(case)["logits"]) < BFLOAT16_ERROR


def test_chat_on_cuda(recording, on_cuda):
    image, settings = recorded_image(200, 130, 0), {"max_new_tokens": 8}
    features = on_cuda.image_processor(image, multi_scale=True, return_tensors="pt")
    answer = on_cuda.chat(recording.tokenizer, image, "What is it?", settings)
    assert answer == on_cuda.chat(recording.tokenizer, features, "What is it?", settings)
    assert next(on_cuda.parameters()).is_cuda


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [[64] * 5, [16, 16, 256, 100, 4]])
def test_varlen_agrees_with_sdpa(lengths, is_causal):
    """Forward and backward; with flash-attn-4's kernels where it is installed."""
    segments = Segments.of_lengths(lengths, torch.device("cuda"))
    tensors = torch.randn(3, sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def output_and_gradient(attend) -> list[torch.Tensor]:
        output = attend(*tensors, segments, 0.125, is_causal)
        return [output, *torch.autograd.grad(output.float().square().sum(), tensors)]

    expected = output_and_gradient(segment_attention_sdpa)
    for attend in (segment_attention_varlen, segment_attention_flash)[: 1 + is_flash_attn_2_available()]:
        for actual, reference in zip(output_and_gradient(attend), expected, strict=True):
            assert relative_error(actual, reference) < 0.02


def test_packed_rows_have_the_loss_of_rows_of_their_own(recording, on_cuda):
    examples = [example(("Hi", "a wave")), example(("What is it?", "b"), images=(recorded_image(64, 48, 0),))]
    packed = recording.processor.training_batch(examples, row_length=500).to("cuda")
    alone = recording.processor.training_batch(examples).to("cuda")
    with torch.no_grad():
        assert on_cuda(**packed).loss.item() == pytest.approx(on_cuda(**alone).loss.item(), rel=0.02)


def test_patches_normalized_on_the_gpu_are_those_of_the_cpu(recording):
    images = [recorded_image(200, 130, 0), recorded_image(31, 700, 1)]
    on_cpu = recording.processor.image_processor(images, multi_scale=True, return_tensors="pt")
    on_gpu = recording.processor.image_processor(images, multi_scale=True, return_tensors="pt", device="cuda")
    assert torch.equal(on_gpu["pixel_values"].cpu(), on_cpu["pixel_values"])


@pytest.mark.parametrize("flash_decoding", [False, True])
def test_an_optimized_model_gives_the_same_answers(recording, on_cuda, flash_decoding):
    image, settings = recorded_image(200, 130, 0), {"max_new_tokens": 6, "output_logits": True}
    inputs = recording.processor(text="<image>\nWhat is it?", images=image, return_tensors="pt").to("cuda")
    arguments = {**inputs, **settings, "do_sample": False, "return_dict_in_generate": True}
    expected = on_cuda.generate(**arguments).logits[0]
    torch._dynamo.reset()
    on_cuda.optimize_for_inference(tune=False, flash_decoding=flash_decoding)
    for _ in range(2):
        output = on_cuda.generate(**arguments)
        assert relative_error(output.logits[0].cpu(), expected.cpu()) < BFLOAT16_ERROR
    session = on_cuda.chat_session(recording.tokenizer, {"max_new_tokens": 6})
    assert isinstance(session.ask("What is it?", image), str) and isinstance(session.ask("Why?"), str)


def test_sdpa_means_the_varlen_kernel_in_half_precision():
    half = torch.zeros(4, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert segment_attention_function("sdpa", half) is segment_attention_varlen
    assert segment_attention_function("sdpa", half.float()) is segment_attention_sdpa


def test_no_attention_runs_on_cudnn(on_cuda):
    """cuDNN plans every new length, for 50 ms and more."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        cache = on_cuda(torch.ones(1, 37, dtype=torch.long, device="cuda")).past_key_values
        on_cuda(torch.ones(1, 1, dtype=torch.long, device="cuda"), past_key_values=cache)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::scaled_dot_product_attention" in names and not any("cudnn" in name for name in names)


@pytest.mark.parametrize("tuned", [False, True])
def test_compiled_decoding_on_a_static_cache_is_one_graph_without_host_sync(on_cuda, tuned):
    config = on_cuda.config.text_config
    position = torch.tensor([3], device="cuda")
    inputs = {"input_ids": torch.ones(1, 1, dtype=torch.long, device="cuda"), "position_ids": position[None]}
    cache = StaticCache(config, max_batch_size=1, max_cache_len=8, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = compile_decoder(on_cuda, tuned)
    with torch.no_grad():
        expected = on_cuda(**inputs, past_key_values=cache, cache_position=position).logits
        compiled(**inputs, past_key_values=cache, cache_position=position)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = compiled(**inputs, past_key_values=cache, cache_position=position).logits.clone()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert relative_error(logits.cpu(), expected.cpu()) < BFLOAT16_ERROR
