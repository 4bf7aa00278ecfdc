"""Packed rows: documents attend to themselves alone, without a mask, and the loss needs no full logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from test_modeling import build, image_inputs, prompt, with_implementation
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.data import DataCollatorWithFlattening

from navil import modeling_navil as modeling

LENGTHS = (9, 23, 5)


def offsets_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def losses_and_gradients(model, batches, **settings) -> tuple[float, torch.Tensor]:
    """Of the labels of all batches: their mean, and its gradient by all parameters."""
    model.zero_grad()
    num_items = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    loss = sum(model(**batch, **settings, num_items_in_batch=num_items).loss for batch in batches)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def documents(with_images: bool) -> tuple[list[dict], dict]:
    """Three documents, each a batch of its own, and the same as one row."""
    grids = [(4, 6), (2, 2)] if with_images else []
    ids = [prompt(6), prompt(1), prompt(text=12)] if with_images else [torch.randint(20, 200, (1, n)) for n in LENGTHS]
    images = [image_inputs(grid) for grid in grids]
    labels = [torch.where(one > 9, one, -100) for one in ids]
    for one in labels:
        one[:, 0] = -100  # the last token of the document before would predict it
    batches = [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]
    for batch, inputs in zip(batches, images, strict=False):
        batch |= inputs
    row = {name: torch.cat([batch[name] for batch in batches], dim=1) for name in ("input_ids", "labels")}
    row |= {name: torch.cat([one[name] for one in images]) for name in (images[0] if images else ())}
    return batches, row | {"cu_seq_lens_q": offsets_of(*(one.shape[1] for one in ids))}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("with_images", [False, True])
def test_packed_documents_train_as_in_rows_of_their_own(with_images, implementation, checkpointing):
    model = with_implementation(build(), implementation).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches, row = documents(with_images)
    loss, gradient = losses_and_gradients(model, batches)
    packed_loss, packed_gradient = losses_and_gradients(model, [row])
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert relative_error(packed_gradient, gradient) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 3.0}])
def test_positions_that_restart_begin_documents(scaling):
    """As from transformers' DataCollatorWithFlattening, with or without offsets; also beyond the trained context."""
    model = build(text={"rope_scaling": scaling, "max_position_embeddings": 16})
    features = [{"input_ids": torch.randint(20, 200, (n,)).tolist()} for n in LENGTHS]
    expected = torch.cat([model(torch.tensor([one["input_ids"]])).logits[0] for one in features])
    batch = dict(DataCollatorWithFlattening(return_tensors="pt")(features))
    positions = batch["position_ids"]
    inputs = {"input_ids": batch["input_ids"]}
    offsets = {"cu_seq_lens_q": offsets_of(*LENGTHS), "cu_seq_lens_k": offsets_of(*LENGTHS), "max_length_q": 23}
    for packing in ({"position_ids": positions}, offsets, {"position_ids": positions, **offsets}):
        assert relative_error(model(**inputs, **packing).logits[0], expected) < 1e-5


@torch.no_grad()
def test_rows_have_documents_of_their_own():
    model = build()
    ids = torch.randint(20, 200, (2, 12))
    parts = [ids[:1, :4], ids[:1, 4:], ids[1:, :10], ids[1:, 10:]]
    expected = torch.cat([model(part).logits[0] for part in parts])
    logits = model(ids, cu_seq_lens_q=offsets_of(4, 8, 10, 2)).logits
    assert relative_error(logits.flatten(0, 1), expected) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cu_seq_lens_q": offsets_of(5, 6)}, "rise from 0 to 12"),
        ({"cu_seq_lens_q": offsets_of(12)}, "the end of each of the 2 rows"),
        ({"cu_seq_lens_q": offsets_of(6, 0, 6)}, "rise from 0"),
        ({"cu_seq_lens_q": offsets_of(6, 6), "cu_seq_lens_k": offsets_of(6, 4, 2)}, "cu_seq_lens_k must equal"),
        ({"cu_seq_lens_q": offsets_of(6, 6), "max_length_q": 5}, "a document has 6"),
        ({"cu_seq_lens_k": offsets_of(6, 6)}, "need cu_seq_lens_q"),
        ({"cu_seq_lens_q": offsets_of(6, 6), "attention_mask": torch.ones(2, 6)}, "without an attention_mask"),
        ({"cu_seq_lens_q": offsets_of(6, 6), "use_cache": True}, "a cache"),
        ({"cu_seq_lens_q": offsets_of(6, 6), "past_key_values": DynamicCache()}, "a cache"),
        ({"cu_seq_lens_q": offsets_of(6, 6), "output_attentions": True}, "attention weights"),
    ],
)
def test_packing_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.ones(2, 6, dtype=torch.long), **settings)


def test_positions_that_restart_change_nothing_with_a_mask_or_a_cache():
    model, ids = build(), torch.randint(20, 200, (1, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        for settings in ({"attention_mask": torch.ones(1, 6)}, {"use_cache": True}):
            together = model(ids, position_ids=positions, **settings).logits
            assert relative_error(together[:, 3:], packed[:, 3:]) > 1e-2


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that a call makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            self.elements = max(self.elements, one.numel() if isinstance(one, torch.Tensor) else 0)
        return result


def test_no_tensor_of_a_training_step_grows_faster_than_the_row(monkeypatch):
    """Neither a mask of L x L nor logits of L x vocabulary."""
    monkeypatch.setattr(modeling, "LOSS_CHUNK", 32)
    model = build(text={"vocab_size": 5000}).train()
    largest = []
    for length in (1024, 2048):
        ids = torch.randint(20, 200, (1, length))
        with Largest() as mode:
            model(ids, labels=ids, cu_seq_lens_q=offsets_of(*[128] * (length // 128))).loss.backward()
        largest.append(mode.elements)
    weights = model.lm_head.weight.numel()
    assert max(largest) <= max(weights, 2048 * 4 * model.config.text_config.intermediate_size)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_in_chunks_is_that_of_all_logits(monkeypatch, weighted):
    model = build().train()
    ids = torch.randint(20, 200, (2, 30))
    labels = torch.where(torch.rand(2, 30) < 0.7, ids, -100)
    weight = {"loss_weight": torch.rand(2, 30)} if weighted else {}

    def loss_and_gradient() -> tuple[float, torch.Tensor]:
        return losses_and_gradients(model, [{"input_ids": ids, "labels": labels}], **weight)

    whole, gradient = loss_and_gradient()
    monkeypatch.setattr(modeling, "LOSS_CHUNK", 7)
    chunked, chunked_gradient = loss_and_gradient()
    assert chunked == pytest.approx(whole, rel=1e-6) and relative_error(chunked_gradient, gradient) < 1e-5
    if not weighted:
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        assert whole == pytest.approx(F.cross_entropy(logits, labels[:, 1:].flatten()).item(), rel=1e-5)


def test_logits_of_a_training_step_are_computed_on_request():
    model, ids = build(), torch.randint(20, 200, (1, 6))
    assert model.eval()(ids, labels=ids).logits is not None and model(ids, output_logits=False).logits is None
    assert model.train()(ids, labels=ids).logits is None and model(ids).logits is not None
    assert model(ids, labels=ids, output_logits=True).logits.shape == (1, 6, model.config.vocab_size)
    model.config.output_logits = True
    assert model(ids, labels=ids).logits is not None
