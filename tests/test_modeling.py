"""The model's paths against each other, and what it refuses. Its peers are in the tests of conversions."""

import numpy as np
import pytest
import torch
from conftest import refused, relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

from navil import modeling_navil as modeling
from navil.configuration_navil import NaViLConfig, NaViLTextConfig, NaViLVisionConfig

SIZE = {"hidden_size": 64, "intermediate_size": 96}
TEXT = {**SIZE, "vocab_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {**SIZE, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE, START = 8, 10  # ids of <IMG_CONTEXT> and <img>


def build(text: dict | None = None, vision: dict | None = None) -> modeling.NaViLForConditionalGeneration:
    """A small model with random weights, norms, scales and biases included."""
    parts = {"vision_config": {**VISION, **(vision or {})}, "text_config": {**TEXT, **(text or {})}}
    config = NaViLConfig(**parts, image_token_id=IMAGE, image_start_token_id=START)
    model = modeling.NaViLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.normal_(mean=0.7, std=0.3)
    return model


def with_implementation(model, name: str):
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name
    return model


def image_inputs(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random patches of images with one scale each, grids in patches."""
    num_patches = sum(rows * columns for rows, columns in grids)
    return {
        "pixel_values": torch.randn(num_patches, 768),
        "image_grid_thw": torch.tensor([[1, rows, columns] for rows, columns in grids]),
        "num_scales": torch.ones(len(grids), dtype=torch.long),
    }


def prompt(*cells: int, text: int = 7) -> torch.Tensor:
    """(1, L) ids: for each image some text, <img> and its number of <IMG_CONTEXT>; then text."""
    ids = []
    for count in cells:
        ids += torch.randint(20, 200, (text,)).tolist() + [START] + [IMAGE] * count + [9]
    return torch.tensor([ids + torch.randint(20, 200, (text,)).tolist()])


def test_attention_uses_the_enabled_backends_and_cudnn_only_if_alone():
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "CUDNN_ATTENTION")
    flash, efficient, math, cudnn = (getattr(SDPBackend, name) for name in names)
    assert modeling.sdpa_backends() == [flash, efficient, math]
    with sdpa_kernel([math, cudnn]):
        assert modeling.sdpa_backends() == [math]
    with sdpa_kernel(cudnn):
        assert modeling.sdpa_backends() == [cudnn]


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [[], ["ffn"], ["attention"]])
def test_a_shared_expert_equals_a_copied_one(own):
    both, shared = build(), build({"visual_experts": own})
    block = {"attention": ".self_attn.", "ffn": ".mlp."}
    missing = both.state_dict().keys() - shared.state_dict().keys()
    copied = {
        name for name in both.state_dict() if ".visual." in name and any(block[o] in name for o in block.keys() - own)
    }
    assert missing == copied
    weights = dict(shared.state_dict())
    weights |= {name: weights[name.replace(".visual.", ".text.")] for name in missing}
    both.load_state_dict(weights)
    ids, images = prompt(6), image_inputs((4, 6))
    torch.testing.assert_close(shared(ids, **images).logits, both(ids, **images).logits)
    shared(ids, **images, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in shared.parameters())


def test_visual_token_mask_with_ready_embeddings_equals_pixels():
    model = build()
    ids, images = prompt(6), image_inputs((4, 6))
    expected = model.generate(ids, **images, max_new_tokens=5)[:, ids.shape[1] :]
    with torch.no_grad():
        features = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
        embeds = modeling.fill_slots(model.get_input_embeddings()(ids), ids == IMAGE, features)
        mixed = {"inputs_embeds": embeds, "visual_token_mask": model.model.get_visual_token_mask(ids)}
        assert torch.equal(model(**mixed).logits, model(ids, **images).logits)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
    assert torch.equal(model.generate(**mixed, **settings), expected)
    settings["visual_token_mask"] = torch.rand(ids.shape) < 0.5
    assert torch.equal(model.generate(ids, **settings, use_cache=False), model.generate(ids, **settings))


# -- vision ------------------------------------------------------------------------------------------------------------
VISION_VARIANTS = {
    "full": {},
    "windows": {"fullatt_block_indexes": [1], "window_size": 4},
    "layer-norm": {"norm_type": "layer_norm", "qkv_bias": False, "fullatt_block_indexes": [], "window_size": 8},
}


@pytest.mark.parametrize("variant", VISION_VARIANTS.values(), ids=VISION_VARIANTS)
@pytest.mark.parametrize("order", ["window", "raster"])
def test_packed_images_and_frames_equal_separate_ones(variant, order):
    model = build(vision={**variant, "visual_token_order": order})
    grids = [(1, 4, 6), (1, 10, 14), (2, 4, 6), (1, 2, 2), (1, 14, 10)]
    frames = [(1, rows, columns) for number, rows, columns in grids for _ in range(number)]
    patches = [torch.randn(rows * columns, 768) for _, rows, columns in frames]
    with torch.no_grad():
        packed = model.get_image_features(torch.cat(patches), torch.tensor(grids))
        alone = [model.get_image_features(p, torch.tensor([frame])) for p, frame in zip(patches, frames, strict=True)]
    assert relative_error(packed, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("variant", VISION_VARIANTS.values(), ids=VISION_VARIANTS)
def test_window_and_raster_order_hold_the_same_tokens(variant):
    model, grids, images = build(vision=variant), [(5, 7), (3, 2)], image_inputs((10, 14), (6, 4))
    side, order = model.config.vision_config.window_size // 2, []
    for rows, columns in grids:  # row-major over windows and inside them
        cells = sorted(np.ndindex(rows, columns), key=lambda cell: (cell[0] // side, cell[1] // side, *cell))
        start = len(order)
        order += [start + row * columns + column for row, column in cells]
    with torch.no_grad():
        raster = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
        model.config.vision_config.visual_token_order = "window"
        windowed = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    assert torch.equal(windowed, raster[order])


# -- one path against another ------------------------------------------------------------------------------------------
def test_the_vision_encoder_refuses_an_attention_that_it_lacks():
    model = with_implementation(build(), "flex")
    with pytest.raises(ValueError, match="vision encoder, or of packed rows, is one of .*'sdpa'.* got 'flex'"):
        model.get_image_features(torch.zeros(4, 768), torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize(("mask", "past_length"), [(torch.ones(1, 1, 3, 3, dtype=torch.bool), 0), (None, None)])
def test_flash_attention_refuses_dense_masks_and_static_caches(mask, past_length):
    with pytest.raises(ValueError, match="neither a .* mask nor a static cache"):
        modeling.CausalMask(mask, torch.arange(3), past_length, "flash_attention_2", torch.float32)


def test_autocast_gives_vision_attention_one_dtype(monkeypatch):
    dtypes = []

    def attend(query, key, value, segments, scaling):
        dtypes.append({query.dtype, key.dtype, value.dtype})
        return value

    monkeypatch.setitem(modeling.SEGMENT_ATTENTION_FUNCTIONS, "sdpa", attend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        build().get_image_features(torch.zeros(4, 768), torch.tensor([[1, 2, 2]]))
    assert dtypes == [{torch.bfloat16}] * 3


class Int8Linear(nn.Module):
    """As quantizers leave a linear layer: whole numbers and a scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_pixels_survive_a_quantized_patch_embedding():
    model, images = build(), image_inputs((4, 6))
    with torch.no_grad():
        expected = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
        model.vision_model.patch_embedding = Int8Linear(model.vision_model.patch_embedding)
        quantized = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    assert relative_error(quantized, expected) < 0.05


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_full_forward(implementation, cache):
    model = with_implementation(build(), implementation)
    ids, images = prompt(35), image_inputs((10, 14))
    length, prefill = ids.shape[1], ids.shape[1] - 5
    past, mask = DynamicCache(), None
    if cache == "static":
        past = StaticCache(model.config.text_config, max_batch_size=1, max_cache_len=80, dtype=torch.float32)
        mask = nn.functional.pad(torch.ones(1, prefill), (0, 80 - prefill))  # as long as the cache
    with torch.no_grad():
        expected = model(ids, **images).logits
        logits = [model(ids[:, :prefill], **images, attention_mask=mask, past_key_values=past, use_cache=True).logits]
        # Two tokens at once, then one by one.
        for start, stop in ((prefill, prefill + 2), *((i, i + 1) for i in range(prefill + 2, length))):
            position = torch.arange(start, stop)
            logits.append(model(ids[:, start:stop], past_key_values=past, cache_position=position).logits)
    assert relative_error(torch.cat(logits, dim=1), expected) < 1e-5


def test_the_cache_goes_by_either_name():
    model = build()
    ids = torch.randint(20, 200, (1, 9))
    for part in (model, model.model):
        caches = [part(ids[:, :6]).past_key_values for _ in range(2)]
        old = part(ids[:, 6:], past_key_values=caches[0])
        new = part(ids[:, 6:], cache=caches[1])
        assert torch.equal(old[0], new[0]) and new.past_key_values is caches[1]
        assert caches[1].get_seq_length() == 9
        with refused("two names of one thing"):
            part(ids[:, 6:], past_key_values=caches[0], cache=caches[1])


@pytest.mark.parametrize("generated", [IMAGE, START])
def test_generated_image_tokens_are_text(generated):
    model = build()
    ids, images = prompt(6), image_inputs((4, 6))

    def say_it_twice(ids, scores):
        return scores.index_fill(1, torch.tensor([generated]), 1e4) if ids.shape[1] < length + 2 else scores

    length = ids.shape[1]
    settings = {"max_new_tokens": 6, "logits_processor": [say_it_twice]}
    cached = model.generate(ids, **images, **settings)
    assert cached[0, length : length + 2].tolist() == [generated] * 2
    assert torch.equal(model.generate(ids, **images, **settings, use_cache=False), cached)


def test_logits_to_keep():
    model = build()
    ids, images = prompt(6), image_inputs((4, 6))
    with torch.no_grad():
        full = model(ids, **images).logits
        assert relative_error(model(ids, **images, logits_to_keep=3).logits, full[:, -3:]) < 1e-6
        assert relative_error(model(ids, **images, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]]) < 1e-6


def test_hidden_states_and_attentions_are_returned_as_asked_or_configured():
    model = with_implementation(build(), "eager")  # later transformers allow output_attentions in a config for it only
    ids, images = prompt(6), image_inputs((4, 6))
    with torch.no_grad():
        outputs = model(ids, **images, output_hidden_states=True)
        features = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
        embeds = modeling.fill_slots(model.get_input_embeddings()(ids), ids == IMAGE, features)
        assert torch.equal(outputs.hidden_states[0], embeds)  # in the order of the sequence
        model.config.output_hidden_states = model.config.output_attentions = True
        outputs = model(ids, **images)
        assert len(outputs.hidden_states) == 3 and outputs.attentions[1].shape[1] == 4
        assert model(ids, **images, output_hidden_states=False).hidden_states is None


def test_loss_divides_by_the_accumulated_number_of_labels():
    model = build()
    ids = torch.randint(20, 200, (1, 12))
    with torch.no_grad():
        mean = model(ids, labels=ids).loss
        shared = model(ids, labels=ids, num_items_in_batch=22).loss
    assert shared.item() == pytest.approx(mean.item() * 11 / 22, rel=1e-6)


def test_sequences_beyond_the_context_are_rescaled_one_by_one():
    model = build(text={"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16})
    ids, mask = torch.randint(20, 200, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[1, :29] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        assert relative_error(together[0], model(ids[:1]).logits[0]) < 1e-5
        assert relative_error(together[1, 29:], model(ids[1:, 29:]).logits[0]) < 1e-5


# -- bad input ---------------------------------------------------------------------------------------------------------
IMAGES = image_inputs((4, 6))
PIXELS, GRID = IMAGES["pixel_values"], IMAGES["image_grid_thw"]
ONES = torch.ones(1, 20, dtype=torch.long)
BAD_INPUTS = [
    ("5 <IMG_CONTEXT> tokens but the images give 6 visual tokens", lambda model: model(prompt(5), **IMAGES)),
    ("7 <IMG_CONTEXT> tokens but the images give 6 visual tokens", lambda model: model(prompt(7), **IMAGES)),
    ("describes 16 patches but pixel_values has 24", lambda model: give(model, PIXELS, [[1, 4, 4]])),
    ("positive, rows and columns multiples of 2; got [1, 3, 8]", lambda model: give(model, PIXELS, [[1, 3, 8]])),
    ("(scales, 3) whole numbers, at least one scale; got (3,)", lambda model: give(model, PIXELS, [1, 4, 6])),
    ("6 <IMG_CONTEXT> tokens but the images give 0 visual", lambda model: give(model, PIXELS[:0], GRID[:0].tolist())),
    ("700 numbers per patch, expected 768", lambda model: give(model, PIXELS[:, :700], [[1, 4, 6]])),
    ("adds up to 2 but image_grid_thw has 1 scales", lambda model: give(model, PIXELS, [[1, 4, 6]], torch.tensor([2]))),
    ("needs image_grid_thw, and input_ids or inputs_embeds", lambda model: model(prompt(6), pixel_values=PIXELS)),
    ("exactly one of input_ids and inputs_embeds", lambda model: model.language_model()),
    ("exactly one of input_ids and inputs_embeds", lambda model: model()),
    ("exactly one of input_ids and inputs_embeds", lambda model: model(ONES, inputs_embeds=torch.zeros(1, 20, 64))),
    (
        "visual_token_mask is (1, 3) but the tokens are (1, 20)",
        lambda model: model.language_model(ONES, visual_token_mask=torch.ones(1, 3, dtype=torch.bool)),
    ),
    ("attention_mask must be", lambda model: model(ONES, attention_mask=torch.ones(1, 20, 20))),
    ("got (1, 20, 20)", lambda model: model(ONES, attention_mask=torch.ones(1, 20, 20))),
    ("covers 3 keys but there are at least 20", lambda model: model(ONES, attention_mask=torch.ones(1, 3))),
    ("covers 30 keys but there are 20", lambda model: model(ONES, attention_mask=torch.ones(1, 30))),
    ("labels are (1, 5) but the tokens are (1, 20)", lambda model: model(ONES, labels=ONES[:, :5])),
]


def give(model, pixel_values, grids, num_scales=None):
    return model(prompt(6), pixel_values=pixel_values, image_grid_thw=torch.tensor(grids), num_scales=num_scales)


@pytest.mark.parametrize(("message", "call"), BAD_INPUTS, ids=[message for message, _ in BAD_INPUTS])
def test_bad_inputs_are_refused_with_both_numbers(message, call):
    with torch.no_grad(), refused(message):
        call(build())


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_refuses_more_images_than_slots_and_unset_token_ids(settings):
    model, ids = build(), prompt(6)
    with refused("6 <IMG_CONTEXT> tokens but the images give 12 visual tokens"):
        model.generate(ids, **image_inputs((4, 6), (4, 6)), max_new_tokens=2, **settings)
    model.config.image_token_id = None
    with refused("call init_special_token_ids"):
        model(ids, **IMAGES)


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (NaViLVisionConfig, {"hidden_size": 66}, "66 does not divide by 8"),
        (NaViLVisionConfig, {"window_size": 5}, "5 does not divide by 2"),
        (NaViLVisionConfig, {"norm_type": "batch_norm"}, "batch_norm"),
        (NaViLVisionConfig, {"visual_token_order": "random"}, "random"),
        (NaViLVisionConfig, {"fullatt_block_indexes": [0, 3]}, "[3] lie outside the 3 blocks"),
        (NaViLTextConfig, {"num_key_value_heads": 3}, "4 does not divide by 3"),
        (NaViLTextConfig, {"head_dim": 15}, "15 does not divide by 2"),
        (NaViLTextConfig, {"hidden_size": 66}, "66 does not divide by 4"),
        (NaViLTextConfig, {"visual_experts": ["attention", "mlp"]}, "got ['attention', 'mlp']"),
        (NaViLTextConfig, {"visual_experts": "ffn"}, "got 'ffn'"),
        (NaViLTextConfig, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (NaViLTextConfig, {"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, "0.5"),
        (NaViLConfig, {"min_dynamic_patch": 9, "max_dynamic_patch": 8}, "9 is larger than max_dynamic_patch 8"),
        (NaViLConfig, {"scale_downsample_ratio": 1.5}, "1.5"),
        (NaViLConfig, {"image_token_id": 200}, "200 lies outside the vocabulary of 200"),
    ],
)
def test_configs_refuse_sizes_that_do_not_fit(config_class, settings, message):
    whole = {"vision_config": VISION, "text_config": TEXT}
    valid = {NaViLVisionConfig: VISION, NaViLTextConfig: TEXT, NaViLConfig: whole}[config_class]
    config_class(**valid)
    with refused(message):
        config_class(**{**valid, **settings})
