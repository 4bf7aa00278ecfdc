"""The released model in plain equations (arXiv 2510.08565; docs/conversion.md) on tensors of the released layout.

Dense and slow, one sequence at a time, without code of the package: an independent peer for checkpoints that have no
recording.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SPECIAL_TOKENS = "</box> <box> <IMG_CONTEXT> </img> <img> </quad> <quad> </ref> <ref> <img_uncond>".split()
SPECIAL_TOKENS += ["<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>"]


class ReleasedModel:
    def __init__(self, config: dict, tensors: dict[str, Tensor], token_ids: dict[str, int]):
        self.vision, self.llm = config["vision_config"], config["llm_config"]
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.token_ids = token_ids

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    # -- vision --------------------------------------------------------------------------------------------------------

    def window_of_cells(self, rows: int, columns: int) -> list[list[int]]:
        side = self.vision["window_size"] // 2
        return [
            [r * columns + c for r in range(top, min(top + side, rows)) for c in range(left, min(left + side, columns))]
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]

    def visual_tokens(self, pixel_values: Tensor, grids: list[list[int]]) -> Tensor:
        kernel = self.tensors["vision_model.embeddings.patch_embedding.weight"]
        bias = self.tensors["vision_model.embeddings.patch_embedding.bias"]
        x = F.conv2d(pixel_values.double().view(-1, 3, 16, 16), kernel, bias, stride=16).flatten(1)
        angles, order, segment, window = [], [], [], []
        half = self.vision["hidden_size"] // self.vision["num_attention_heads"] // 2
        frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2).double() / half)
        start = 0
        for index, (_, rows, columns) in enumerate(grids):
            patches = [
                (2 * r + i, 2 * c + j)
                for r in range(rows // 2)
                for c in range(columns // 2)
                for i in (0, 1)
                for j in (0, 1)
            ]
            angles += [torch.cat([row * frequencies, column * frequencies]) for row, column in patches]
            for number, cells in enumerate(self.window_of_cells(rows // 2, columns // 2)):
                for cell in cells:
                    order += [start + 4 * cell + k for k in range(4)]
                    window += [1000 * index + number] * 4
                    segment += [index] * 4
            start += rows * columns
        x, angles = x[order], torch.stack(angles)[order].repeat(1, 2)
        segment, window = torch.tensor(segment), torch.tensor(window)
        full_blocks = self.vision["fullatt_block_indexes"]
        for layer in range(self.vision["num_hidden_layers"]):
            groups = segment if full_blocks is None or layer in full_blocks else window
            x = self.vision_block(x, f"vision_model.encoder.layers.{layer}", angles, groups)
        x = x.view(-1, 4 * self.vision["hidden_size"])
        x = F.layer_norm(x, x.shape[-1:], self.tensors["mlp1.0.weight"], self.tensors["mlp1.0.bias"], eps=1e-5)
        return self.linear(F.gelu(self.linear(x, "mlp1.1")), "mlp1.3")

    def vision_block(self, x: Tensor, name: str, angles: Tensor, groups: Tensor) -> Tensor:
        heads = self.vision["num_attention_heads"]
        q, k, v = self.linear(self.vision_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (t.view(len(x), heads, -1).transpose(0, 1) for t in (q, k, v))
        q, k = rotate(q, angles), rotate(k, angles)
        allowed = groups[:, None] == groups[None]
        attended = attend(q, k, v, allowed).transpose(0, 1).flatten(1)
        x = x + self.tensors[f"{name}.ls1"] * self.linear(attended, f"{name}.attn.proj")
        hidden = F.gelu(self.linear(self.vision_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.tensors[f"{name}.ls2"] * self.linear(hidden, f"{name}.mlp.fc2")

    def vision_norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self.tensors[f"{name}.weight"], self.vision["layer_norm_eps"]
        if self.vision["norm_type"] == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], weight, self.tensors[f"{name}.bias"], eps)
        return rms_norm(x, weight, eps)

    # -- decoder -------------------------------------------------------------------------------------------------------

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None, grids: list[list[int]]) -> Tensor:
        """(L,) ids -> (L, vocabulary)."""
        is_internlm2 = self.llm["model_type"] == "internlm2"
        table = self.tensors[f"language_model.model.{'tok_embeddings' if is_internlm2 else 'embed_tokens'}.weight"]
        x = table[input_ids]
        for row, token in enumerate(SPECIAL_TOKENS):
            x[input_ids == self.token_ids[token]] = self.tensors["special_token_embedding.weight"][row]
        visual = torch.zeros(len(input_ids), dtype=torch.bool)
        if pixel_values is not None:
            slots = input_ids == self.token_ids["<IMG_CONTEXT>"]
            x[slots] = self.visual_tokens(pixel_values, grids)
            visual = slots | (input_ids == self.token_ids["<img>"])
        layer = self.internlm2_layer if is_internlm2 else self.qwen3_layer
        for index in range(self.llm["num_hidden_layers"]):
            x = layer(x, f"language_model.model.layers.{index}", visual)
        x = rms_norm(x, self.tensors["language_model.model.norm.weight"], self.llm["rms_norm_eps"])
        head = f"language_model.{'output' if is_internlm2 else 'lm_head'}.weight"
        return x @ (table if self.llm["tie_word_embeddings"] else self.tensors[head]).T

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(L, heads, head_dim) each -> (L, heads * head_dim)."""
        length, heads, head_dim = q.shape
        theta = self.llm["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
        angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(heads // len(k), dim=0) for t in (k, v))
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        return attend(rotate(q, angles), rotate(k, angles), v, allowed).transpose(0, 1).flatten(1)

    def qwen3_layer(self, x: Tensor, name: str, visual: Tensor) -> Tensor:
        eps, head_dim = self.llm["rms_norm_eps"], self.llm["head_dim"]
        normed = rms_norm(x, self.tensors[f"{name}.input_layernorm.weight"], eps)

        def heads(projection: str, norm: str | None) -> Tensor:
            both = []
            for suffix in ("", "_ve"):
                out = self.linear(normed, f"{name}.self_attn.{projection}{suffix}").view(len(x), -1, head_dim)
                if norm:
                    out = rms_norm(out, self.tensors[f"{name}.self_attn.{norm}{suffix}.weight"], eps)
                both.append(out)
            return torch.where(visual[:, None, None], both[1], both[0])

        attended = self.causal_attention(heads("q_proj", "q_norm"), heads("k_proj", "k_norm"), heads("v_proj", None))
        text, image = (self.linear(attended, f"{name}.self_attn.o_proj{suffix}") for suffix in ("", "_ve"))
        x = x + torch.where(visual[:, None], image, text)
        normed = rms_norm(x, self.tensors[f"{name}.post_attention_layernorm.weight"], eps)
        text, image = (
            self.feed_forward(normed, f"{name}.mlp{suffix}", "gate_proj", "up_proj", "down_proj")
            for suffix in ("", "_ve")
        )
        return x + torch.where(visual[:, None], image, text)

    def internlm2_layer(self, x: Tensor, name: str, visual: Tensor) -> Tensor:
        eps, kv_heads = self.llm["rms_norm_eps"], self.llm["num_key_value_heads"]
        head_dim = self.llm["hidden_size"] // self.llm["num_attention_heads"]
        normed = rms_norm(x, self.tensors[f"{name}.attention_norm.weight"], eps)
        text, image = (self.linear(normed, f"{name}.attention.wqkv{suffix}") for suffix in ("", "_ve"))
        grouped = torch.where(visual[:, None], image, text).view(len(x), kv_heads, -1, head_dim)
        q, k, v = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
        attended = self.linear(self.causal_attention(q, k, v), f"{name}.attention.wo")  # visual tokens take both
        x = x + torch.where(visual[:, None], self.linear(attended, f"{name}.attention.wo_ve"), attended)
        normed = rms_norm(x, self.tensors[f"{name}.ffn_norm.weight"], eps)
        text, image = (
            self.feed_forward(normed, f"{name}.feed_forward{suffix}", "w1", "w3", "w2") for suffix in ("", "_ve")
        )
        return x + torch.where(visual[:, None], image, text)

    def feed_forward(self, x: Tensor, name: str, gate: str, up: str, down: str) -> Tensor:
        gated = F.silu(self.linear(x, f"{name}.{gate}")) * self.linear(x, f"{name}.{up}")
        return self.linear(gated, f"{name}.{down}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v
