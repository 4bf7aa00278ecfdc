"""What the speed rests on, without timing: no work is done twice, and no host sync is needless."""

import torch
from test_modeling import build, image_inputs, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique")


class Operations(TorchDispatchMode):
    """Records what reaches the kernels: host syncs, multiplications in matrix products, keys of fused attention."""

    def __init__(self):
        super().__init__()
        self.num_syncs = 0
        self.multiplications = 0
        self.attended_keys = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.num_syncs += any(part in name for part in SYNCHRONIZING)
        if name in ("mm", "addmm"):
            left = args[-2]
            self.multiplications += result.numel() * left.shape[-1]
        if "scaled_dot_product" in name:
            self.attended_keys.append(args[1])
        return result


def count(work) -> Operations:
    with torch.no_grad(), Operations() as operations:
        work()
    return operations


def test_host_syncs_do_not_grow_with_depth():
    ids, images = prompt(6, 4), image_inputs((4, 6), (4, 4))
    shallow, deep = (build({"num_hidden_layers": depth}, {"num_hidden_layers": depth}) for depth in (1, 5))
    assert count(lambda: deep(ids, **images)).num_syncs == count(lambda: shallow(ids, **images)).num_syncs > 0


def test_decoding_step_on_a_static_cache_has_no_host_sync_and_is_one_graph():
    model = build()
    config, position = model.config.text_config, torch.tensor([3])
    inputs = {"input_ids": torch.ones(1, 1, dtype=torch.long), "position_ids": position[None]}

    def step(decoder) -> torch.Tensor:
        cache = StaticCache(config, max_batch_size=1, max_cache_len=8, device="cpu", dtype=torch.float32)
        return decoder(**inputs, past_key_values=cache, cache_position=position).logits

    with torch.no_grad():
        expected = step(model)
        assert count(lambda: step(model)).num_syncs == 0
        assert torch.equal(step(torch.compile(model, backend="eager", fullgraph=True)), expected)


def test_decoding_step_copies_no_cached_keys():
    """Heads that share keys read the same memory."""
    model = build()
    cache = StaticCache(model.config.text_config, max_batch_size=2, max_cache_len=8, device="cpu", dtype=torch.float32)
    ids, position = torch.ones(2, 1, dtype=torch.long), torch.tensor([3])
    operations = count(lambda: model(ids, past_key_values=cache, cache_position=position))
    assert [keys.data_ptr() for keys in operations.attended_keys] == [keys.data_ptr() for keys in cache.key_cache]


def test_mixed_tokens_cost_as_many_multiplications_as_text():
    """Each expert runs on its own tokens only; here 75 % of the tokens are visual."""
    model = build()
    ids = torch.ones(2, 16, dtype=torch.long)
    visual = torch.zeros(2, 16, dtype=torch.bool)
    visual[:, 2:14] = True
    mixed, text = count(lambda: model(ids, visual_token_mask=visual)), count(lambda: model(ids))
    assert mixed.multiplications == text.multiplications > 0


def test_packed_images_cost_as_much_as_single_ones():
    """Nothing is padded."""
    vision = build().vision_model

    def work(*grids: tuple[int, int]) -> int:
        images = image_inputs(*grids)
        return count(lambda: vision(images["pixel_values"], images["image_grid_thw"])).multiplications

    assert work((4, 6), (2, 2), (8, 10)) == work((4, 6)) + work((2, 2)) + work((8, 10)) > 0


def test_logits_are_computed_only_where_they_are_kept():
    model = build()
    ids = torch.randint(200, (1, 12))
    all_logits, last = count(lambda: model(ids)), count(lambda: model(ids, logits_to_keep=1))
    head = model.lm_head.weight.numel()
    assert all_logits.multiplications - last.multiplications == 11 * head
