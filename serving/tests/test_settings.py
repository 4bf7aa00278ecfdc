"""vLLM's settings that the plugin caps, changes or refuses, and the memory that it reserves for images."""

import random
from types import SimpleNamespace

import pytest
from navil_vllm.config import NaViLServingConfig
from navil_vllm.processing import num_embeddings
from PIL import Image
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

load_general_plugins()


def model_config(folder, **settings):
    return EngineArgs(str(folder), trust_remote_code=True, dtype="float32", **settings).create_model_config()


def test_context_ends_where_dynamic_ntk_scaling_starts(window, monkeypatch):
    config = model_config(window.folder)
    text = config.hf_text_config
    assert text.rope_type == "dynamic" and text.context_length > text.max_position_embeddings
    assert config.max_model_len == text.max_position_embeddings
    assert model_config(window.folder, max_model_len=100).max_model_len == 100
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with pytest.raises(ValueError, match="dynamic NTK scaling would change the keys"):
        model_config(window.folder, max_model_len=text.max_position_embeddings + 1)


def test_models_with_a_shared_expert_are_refused(tiny):
    with pytest.raises(ValueError, match=r"this one has \['ffn'\]"):
        model_config(tiny.folder, hf_overrides={"text_config": {"visual_experts": ["ffn"]}})


@pytest.mark.parametrize(("given", "expected"), [("FULL_AND_PIECEWISE", "PIECEWISE"), ("FULL", "PIECEWISE")])
@pytest.mark.parametrize("parallel", [{}, {"pipeline_parallel_size": 2}, {"use_ubatching": True}])
def test_graphs_of_the_whole_model_and_split_steps_are_not_used(given, expected, parallel):
    settings = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[given]),
        parallel_config=SimpleNamespace(**{"pipeline_parallel_size": 1, "use_ubatching": False, **parallel}),
        lora_config=None,
        speculative_config=None,
    )
    if parallel:
        with pytest.raises(ValueError, match="NaViL (has no pipeline|cannot split)"):
            NaViLServingConfig.verify_and_update_config(settings)
    else:
        NaViLServingConfig.verify_and_update_config(settings)
        assert settings.compilation_config.cudagraph_mode == CUDAGraphMode[expected]


def test_no_graphs_stay_no_graphs():
    settings = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        lora_config=None,
        speculative_config=None,
    )
    NaViLServingConfig.verify_and_update_config(settings)
    assert settings.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


def test_pipeline_parallelism_is_refused_by_vllm(tiny):
    with pytest.raises((ValueError, NotImplementedError), match="[Pp]ipeline parallelism"):
        EngineArgs(
            str(tiny.folder), trust_remote_code=True, dtype="float32", pipeline_parallel_size=2
        ).create_engine_config()


def test_adapters_on_the_encoder_are_refused(tiny):
    settings = {"enable_lora": True, "enable_tower_connector_lora": True}
    arguments = EngineArgs(str(tiny.folder), trust_remote_code=True, dtype="float32", **settings)
    with pytest.raises(ValueError, match="adapters may change the experts only"):
        arguments.create_engine_config()


def test_draft_models_are_refused(tiny):
    speculation = {"model": str(tiny.folder), "num_speculative_tokens": 2}
    arguments = EngineArgs(str(tiny.folder), trust_remote_code=True, dtype="float32", speculative_config=speculation)
    with pytest.raises(
        ValueError, match="speculative decoding is ngram or ngram_gpu or suffix here, got 'draft_model'"
    ):
        arguments.create_engine_config()


def test_no_image_has_more_visual_tokens_than_reserved(tiny):
    processor = MULTIMODAL_REGISTRY.create_processor(model_config(tiny.folder, limit_mm_per_prompt={"image": 1}))
    info = processor.info
    reserved = info.get_mm_max_tokens_per_item(8192, {"image": 1})["image"]
    cell = info.get_hf_processor().image_processor.cell
    choose, largest = random.Random(0), 0
    for _ in range(600):  # the most tokens have thin images, which are padded to whole cells
        ratio, short = choose.choice([choose.uniform(1, 200), choose.uniform(150, 200)]), choose.randrange(1, 200)
        sides = (short, int(short * ratio))
        [plan] = info.plan([Image.new("L", choose.choice([sides, sides[::-1]]))], {})
        largest = max(largest, num_embeddings(plan.scales, cell))
    assert 0.8 * reserved < largest <= reserved


def test_dummy_images_fit_into_a_short_context(tiny):
    settings = {"limit_mm_per_prompt": {"image": 1}}
    processor = MULTIMODAL_REGISTRY.create_processor(model_config(tiny.folder, max_model_len=128, **settings))
    assert len(processor.get_dummy_mm_inputs({"image": 1})["prompt_token_ids"]) == 128
    processor = MULTIMODAL_REGISTRY.create_processor(model_config(tiny.folder, max_model_len=8, **settings))
    with pytest.raises(ValueError, match="no image fits into a context of 8 tokens"):
        processor.get_dummy_mm_inputs({"image": 1})


@pytest.mark.parametrize("limits", [(4096, 131_072), (262_144, 589_824), (65_536, 6_291_456)])
def test_dummy_images_fit_into_every_context(tiny, limits):
    processor = MULTIMODAL_REGISTRY.create_processor(model_config(tiny.folder, limit_mm_per_prompt={"image": 1}))
    info = processor.info
    image_processor = info.get_hf_processor().image_processor
    image_processor.min_pixels, image_processor.max_pixels = limits
    for length in (info.ctx.model_config.max_model_len, 6831, *range(800, 8000, 411)):
        info.ctx.model_config.max_model_len = length
        images = processor.dummy_inputs.get_dummy_mm_data(length, {"image": 1}, {})["image"]
        [plan] = info.plan(images, {})  # refuses an image that is too thin
        assert 0.5 * min(length, info.count_slot_tokens(info.largest_plan.scales)) < info.count_slot_tokens(plan.scales)
        assert info.count_slot_tokens(plan.scales) <= length
