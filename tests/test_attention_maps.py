"""The attention figures: the weights are the model's, and they lie on the picture where their tokens do."""

import numpy as np
import pytest
import torch
from conftest import ROOT, conversation, recorded_image
from PIL import Image

pytest.importorskip("matplotlib")

from examples import attention_maps  # noqa: E402
from navil.modeling_navil import PackedLayout  # noqa: E402


@pytest.fixture
def maps(recording):
    image = recorded_image(200, 130, 0)
    return attention_maps.compute_maps(recording.model, recording.processor, image, "What is it?", 5)


def test_weights_are_those_that_the_answer_was_generated_with(recording, maps):
    inputs = recording.encode(conversation("What is it?", recorded_image(200, 130, 0)))
    output = recording.model.generate(**inputs, max_new_tokens=5, output_attentions=True, return_dict_in_generate=True)
    prompt_length = inputs["input_ids"].shape[1]
    assert len(maps.answer) == 5 and maps.weights.shape[1] == prompt_length + 5
    for position, layers in enumerate(output.attentions, prompt_length - 1):
        expected = torch.stack([layer[0, :, -1].mean(0) for layer in layers]).numpy()
        assert np.allclose(maps.weights[:, position, : position + 1], expected, atol=1e-5)
    is_visual = recording.model.model.get_visual_token_mask(inputs["input_ids"])[0].numpy()
    assert np.array_equal(maps.is_image[:prompt_length], is_visual)


def test_heat_of_all_scales_adds_up_to_the_attention_on_the_picture(maps):
    assert len(maps.places) > 1
    visual = np.concatenate([places.flatten() for places in maps.places])
    assert sorted(visual) == np.flatnonzero(maps.is_image)[1:].tolist()  # all but <img>
    position = maps.weights.shape[1] - len(maps.answer) - 1
    total = maps.weights[:, position][:, visual].mean(0).sum()
    assert 0.5 * total < maps.heat(0, 130, 200).sum() <= total + 1e-6  # the rest is on padding


@pytest.mark.parametrize("order", ["raster", "window"])
def test_heat_lies_where_the_cell_does(recording, order):
    vision = type(recording.model.config.vision_config)(visual_token_order=order, window_size=4)
    slots = np.arange(100, 115)
    [places] = attention_maps.cell_places(slots, [[1, 6, 10]], vision, PackedLayout)
    # Cell 7 is the third of the window to its left, which comes second of six.
    token = 106 if order == "window" else 107
    assert places[1, 2] == token
    weights = np.zeros((2, 120, 120))
    weights[:, 117, token] = 1
    maps = attention_maps.AttentionMaps(weights, np.zeros(120, bool), ["a", "b"], [places], [(90, 150)], 32)
    heat = maps.heat(0, 180, 300)  # the picture has twice the pixels of the scale on either side
    rows, columns = np.nonzero(heat)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (64, 127, 128, 191)
    assert heat.sum() == pytest.approx(1)
    assert maps.heat(1, 180, 300).sum() == 0


def test_command_line_draws_the_embedded_checkpoint(tmp_path, capsys):
    asked = ["--image", str(ROOT / "examples" / "text.png"), "--question", "What does the text say?"]
    assert attention_maps.main([*asked, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("answer: 83")
    for name in ("layers.png", "answer.png"):
        assert len(set(Image.open(tmp_path / name).convert("RGB").getdata())) > 100
    assert attention_maps.main(["--layers", "9", "--output", str(tmp_path)]) == 1
    assert "--layers [9] lie outside the 8 layers" in capsys.readouterr().err
