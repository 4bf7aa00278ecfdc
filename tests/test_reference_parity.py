"""Converted recordings of the released implementation give its numbers (fixtures/README.md)."""

import pytest
import torch
from conftest import relative_error

TOLERANCE = 1e-5
CASES = ("single", "two_images", "text_only", "multi_turn")
WITH_IMAGES = ("single", "two_images", "multi_turn")


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_visual_tokens_and_their_mask(recording, case):
    tensors, model = recording.tensors(case), recording.model
    with torch.no_grad():
        flat = model.get_image_features(tensors["pixel_values"].flatten(1), tensors["image_grid_thw"])
        square = model.get_image_features(tensors["pixel_values"], tensors["image_grid_thw"])
    assert relative_error(flat, tensors["visual_embeds"]) < TOLERANCE
    assert torch.equal(flat, square)
    mask = model.model.get_visual_token_mask(tensors["input_ids"])
    assert torch.equal(mask, tensors["visual_token_mask"].bool())


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(recording, case):
    tensors = recording.tensors(case)
    with torch.no_grad():
        outputs = recording.model(**recording.inputs(case), output_hidden_states=True)
    assert relative_error(outputs.hidden_states[-1], tensors["last_hidden_state"]) < TOLERANCE
    assert relative_error(outputs.logits, tensors["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_losses(recording, case):
    tensors = recording.tensors(case)
    inputs = recording.inputs(case) | {"labels": tensors["labels"]}
    with torch.no_grad():
        loss = recording.model(**inputs).loss
        weighted_loss = recording.model(**inputs, loss_weight=tensors["loss_weight"]).loss
    assert loss.item() == pytest.approx(tensors["loss"].item(), abs=TOLERANCE)
    assert weighted_loss.item() == pytest.approx(tensors["weighted_loss"].item(), abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_prompt_and_ids_from_chat_and_from_processor(recording, case):
    recorded, expected_ids = recording.cases[case], recording.tensors(case)["input_ids"]
    images = recording.images(case) or []
    turns = [*(recording.history(case) or []), (recorded["question"], None)]
    plans, _ = recording.model.plan_images(images)
    prefix = "" if recorded["history"] else "<image>\n" * len(images)
    turns[-1] = (prefix + recorded["question"], None)
    ids = recording.model.encode_chat(recording.tokenizer, turns, plans)
    assert torch.equal(ids, expected_ids)
    assert recording.tokenizer.decode(ids[0]) == recorded["prompt"]

    unplaced = iter(images)
    messages = []
    for question, answer in turns:
        parts = [{"type": "image", "image": next(unplaced)} for _ in range(question.count("<image>"))]
        parts.append({"type": "text", "text": question.replace("<image>\n", "")})
        messages.append({"role": "user", "content": parts})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    inputs = recording.encode(messages)
    assert torch.equal(inputs["input_ids"], expected_ids)
    if images:
        assert torch.equal(inputs["pixel_values"], recording.tensors(case)["pixel_values"].flatten(1))


def recorded_answer(recording, case) -> torch.Tensor:
    """Recorded new ids, up to the first image token: what comes after it, the released loop embedded by a wrong row."""
    ids = recording.tensors(case)["generated_ids"][0]
    if recording.cases[case]["generated_contains_special_token"]:
        special = torch.isin(ids, torch.tensor(recording.tokenizer.all_special_ids))
        ids = ids[: int(special.int().argmax()) + 1]
    return ids


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(recording, case):
    inputs, expected = recording.inputs(case), recorded_answer(recording, case)
    output = recording.model.generate(**inputs, max_new_tokens=len(expected))
    assert torch.equal(output[0], torch.cat([inputs["input_ids"][0], expected]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["images", "patches"])
def test_chat_answer(recording, case, form):
    recorded, tensors, ids = recording.cases[case], recording.tensors(case), recorded_answer(recording, case)
    if recorded["generated_contains_special_token"]:
        expected = recording.tokenizer.decode(ids, skip_special_tokens=True).strip()
    else:
        expected = recorded["response"]
    settings = {"do_sample": False, "max_new_tokens": len(ids), "top_p": None, "num_beams": 1}
    if form == "images":
        images = {"pixel_values": recording.images(case)}
    else:
        names = {"pixel_values": "pixel_values", "num_patches_list": "image_grid_thw", "num_scales": "num_scales"}
        images = {argument: tensors.get(name) for argument, name in names.items()}
    answer = recording.model.chat(
        recording.tokenizer,
        question=recorded["question"],
        generation_config=settings,
        history=recording.history(case),
        **images,
    )
    assert answer == expected
